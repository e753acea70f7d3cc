"""What an expert makes of its set before its layers."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn


class Net(nn.Module):
    """The interactions of E experts at once, each with parameters and an input of its own.

    Attributes:
        outputs: the width of what it gives.
        alike: it has no parameters, so that all experts of one input get the same from it. Then `count` and E
            are the inputs.
        reads: the keys of [model.experts] that it reads, of those that not every net does.
    """

    outputs: int
    alike: ClassVar[bool] = False
    reads: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def build(cls, experts: Any, count: int, width: int, fields: int) -> Net:
        """For E = `count` experts.

        Args:
            experts: the section [model.experts].
            width: of what an expert reads; the first `fields` columns are its set, the others what else is
                known of a candidate.

        Raises:
            ConfigError: inputs of these widths cannot be read.
        """
        raise NotImplementedError

    def forward(self, x_ECW: Tensor) -> Tensor:
        """[E, C, width] -> [E, C, outputs]."""
        raise NotImplementedError
