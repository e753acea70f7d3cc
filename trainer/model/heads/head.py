"""The head: from what the branches give to one logit a candidate and task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from trainer.config.model import ModelKeys


class Head(nn.Module):
    """Maps the branches' parts to logits, and says what must be known of it.

    Attributes:
        keys: the settings class of a model, or a subclass of it with the keys that this head adds.
        compile_obstacle: why an export cannot compile it; empty if it is one function of the concatenated
            parts.
    """

    keys: ClassVar[type[ModelKeys]] = ModelKeys
    compile_obstacle: ClassVar[str] = "needs its parts one by one"

    @classmethod
    def build(cls, model: Any, widths: Sequence[int], beside: int, tasks: int) -> Head:
        """The head of a model with these settings.

        Args:
            widths: of what each branch gives; beside: of all else that is known of a candidate; tasks: T.
        """
        raise NotImplementedError

    @classmethod
    def problem(cls, model: Any) -> str:
        """What is wrong with a model that has this head; empty if nothing is."""
        return ""

    def forward(self, parts: list[Tensor]) -> Tensor:
        """Parts, each [C, *], those of the branches first -> logits [C, T]."""
        raise NotImplementedError
