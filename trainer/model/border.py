"""The border between tables and everything dense, where a training step may cut the graph in two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from embeddings.groups import TableGroup
from embeddings.lookup.jagged import vectors_in_order


class Cut(NamedTuple):
    """One group's vectors on both sides of the border.

    Attributes:
        group: its name; inside: [B, width], what the tables returned, whose backward pass updates them;
            outside: the same values as a leaf of the dense graph, which collects their gradient.
    """

    group: str
    inside: Tensor
    outside: Tensor

    def gradient(self) -> Tensor:
        """Of the loss by these vectors; zeros where it does not depend on them.

        Zeros and not None: a backward pass exchanges gradients between ranks, so that all must take part
        even if one of them has, say, no behaviors.
        """
        gradient = self.outside.grad
        return torch.zeros_like(self.outside) if gradient is None else gradient


class Lookups(nn.Module):
    """Turns what collections return into tensors [B, width], features in the order of each group.

    Args:
        groups: by name; each says in what order its features come and whether they are added up.

    Attributes:
        frozen: groups whose tables stay as they are: no gradient reaches them.
    """

    def __init__(self, groups: Mapping[str, TableGroup]) -> None:
        super().__init__()
        self.groups = dict(groups)
        self.frozen: frozenset[str] = frozenset()
        self._cuts: list[Cut] | None = None

    @contextmanager
    def cut(self) -> Iterator[list[Cut]]:
        """Within this context, forward passes cut the graph here and add what they cut to the list.

        A fused table is updated inside its backward pass. With the graph cut, the backward pass of a loss
        stops at the border, every gradient can be looked at, and tables are updated by a second one.
        """
        cuts: list[Cut] = []
        self._cuts = cuts
        try:
            yield cuts
        finally:
            self._cuts = None

    def forward(self, pooled: Mapping[str, KeyedTensor]) -> dict[str, Tensor]:
        vectors = {}
        for name, keyed in pooled.items():
            group = self.groups[name]
            vectors[name] = group.fuse(vectors_in_order(keyed, group.keys))
            if name in self.frozen:
                vectors[name] = vectors[name].detach()
            elif self._cuts is not None and torch.is_grad_enabled():
                outside = vectors[name].detach().requires_grad_()
                self._cuts.append(Cut(name, vectors[name], outside))
                vectors[name] = outside
        return vectors
