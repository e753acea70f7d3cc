"""The last linear map of a head, whose input is all that a task's logit is a linear function of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class LastLayer(NamedTuple):
    """A task's logit is `map(phi)[:, row]`, for whatever phi the head makes of a candidate."""

    map: nn.Linear
    row: int

    @property
    def weights(self) -> Tensor:
        """The weights of the logit and then its bias, [W + 1]."""
        return torch.cat([self.map.weight[self.row], self.map.bias[self.row : self.row + 1]]).detach()


@contextmanager
def watched(layers: Sequence[LastLayer]) -> Iterator[dict[nn.Module, Tensor]]:
    """While the context lasts: map -> what it was given in the last forward pass of its head, [C, W]."""
    given: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        given[module] = arguments[0]

    # Tasks of a shared bottom have one map.
    hooks = [module.register_forward_pre_hook(note) for module in dict.fromkeys(each.map for each in layers)]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()
