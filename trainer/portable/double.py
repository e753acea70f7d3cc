"""A head in double precision.

Scores of two runtimes may differ by 1e-6 and no more. Each rounds the sums of a head in an order of its own,
which over some ten thousand candidates costs more than half of that. In double precision only the rounding
of the snapshot is left.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from trainer.model.heads.head import Head, HeadInput


class Slope(nn.Module):
    """A PReLU with one slope for all columns, which ONNX Runtime has in single precision only."""

    def __init__(self, module: nn.PReLU) -> None:
        super().__init__()
        self.weight = module.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, self.weight * x)


def in_double(head: Head) -> Head:
    """A copy of a head in double precision."""
    head = copy.deepcopy(head).double()
    for part in list(head.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.PReLU):
                setattr(part, name, Slope(child))
    return head


def doubled(given: HeadInput) -> HeadInput:
    """What a head is given, in double precision."""
    sets = {name: [part.double() for part in parts] for name, parts in given.sets.items()}
    prior = None if given.prior is None else given.prior.double()
    return replace(given, sets=sets, beside=[part.double() for part in given.beside], prior=prior)
