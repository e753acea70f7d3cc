"""The best weights of a phase that moves no table, kept in memory: nothing of the tables need be saved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.optim.keyed import KeyedOptimizer


class KeptWeights:
    """A copy of some weights, of their optimizer's state and of some buffers.

    Args:
        weights: that move; optimizer: of these and others, with a state already; buffers: that move, too.
    """

    def __init__(
        self, weights: Sequence[nn.Parameter], optimizer: KeyedOptimizer, buffers: Sequence[Tensor] = ()
    ) -> None:
        states = [each for weight in weights for each in optimizer.state[weight].values()]
        self._now = [*(weight.detach() for weight in weights), *states, *buffers]
        self._kept = [each.clone() for each in self._now]

    def take(self) -> None:
        """Keep what they are now."""
        self._copy(self._now, self._kept)

    def restore(self) -> None:
        """Make them what was kept."""
        self._copy(self._kept, self._now)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is kept, for checkpoints, which fill it in place."""
        return {str(place): each for place, each in enumerate(self._kept)}

    @torch.no_grad()
    def _copy(self, source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        for each, into in zip(source, target, strict=True):
            into.copy_(each)
