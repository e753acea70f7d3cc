"""Maps that every domain has a copy of, held equal, so that all domains have one head (D-Train, first phase).

The gradient of the one map is the sum of those of its copies. It stands at the first copy, and those of the
others are 0, so that a norm of all gradients counts the map once. After the optimizer's step the other copies
and their state are those of the first, to the bit. A next phase that lets go of them goes on from clones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torchrec.optim.keyed import KeyedOptimizer


class TiedMaps:
    """Args: weights: [domains, ...] each; optimizer: of these and other weights, with a state already."""

    def __init__(self, weights: Sequence[nn.Parameter], optimizer: KeyedOptimizer) -> None:
        self._weights, self._optimizer = list(weights), optimizer

    @torch.no_grad()
    def differ(self) -> bool:
        """Whether the copies of any map differ."""
        return any(not torch.equal(weight, _first(weight)) for weight in self._weights)

    @torch.no_grad()
    def gather(self) -> None:
        """Add up the gradients of the copies, once those of all ranks are in them."""
        for weight in self._weights:
            if weight.grad is not None:
                weight.grad[0] = weight.grad.sum(0)
                weight.grad[1:] = 0

    @torch.no_grad()
    def spread(self) -> None:
        """Make the other copies and their state those of the first."""
        for tensor in self._tensors():
            tensor.copy_(_first(tensor))

    def _tensors(self) -> Iterator[Tensor]:
        for weight in self._weights:
            yield weight
            state = self._optimizer.state[weight]
            # A count of steps is of all copies anyway.
            yield from (each for each in state.values() if each.shape == weight.shape)


def _first(tensor: Tensor) -> Tensor:
    return tensor[:1].clone().expand_as(tensor)
