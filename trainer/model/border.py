"""The border between tables and everything dense, where a training step may cut the graph in two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from embeddings.groups import TableGroup, side_by_side
from embeddings.lookup.jagged import vectors_in_order


class Cut(NamedTuple):
    """One group's vectors on both sides of the border.

    Attributes:
        group: its name; inside: [B, width], what the main tables returned, whose backward pass updates them;
            outside: the same values as a leaf of the dense graph, which collects their gradient; to them
            those of the lanes are added, if the group has any.
        lanes: task -> what its lane returned, [B, width of the sets that have it].
        tables: the group.
    """

    group: str
    inside: Tensor
    outside: Tensor
    lanes: Mapping[str, Tensor]
    tables: TableGroup

    def gradient(self) -> Tensor:
        """Of the loss by these vectors; zeros where it does not depend on them.

        Zeros and not None: a backward pass exchanges gradients between ranks, so that all must take part
        even if one of them has, say, no behaviors.
        """
        gradient = self.outside.grad
        return torch.zeros_like(self.outside) if gradient is None else gradient

    def returned(self) -> dict[str, Tensor]:
        """What tables returned, of the main tables and of each lane, by names for messages."""
        return {
            self.group: self.inside.detach(),
            **{f"{self.group}, task {task}": vectors.detach() for task, vectors in self.lanes.items()},
        }

    def by_task(self, gradients: Mapping[str, Tensor]) -> list[Pull]:
        """What the backward pass into the tables starts from: for each lane, the gradient of its task alone,
        and for the main tables of a set the rest, which is that of the first of its losses.

        Args:
            gradients: of each task's loss by these vectors, [B, width]; a task without one has none.
        """
        none, tables = torch.zeros_like(self.outside), self.tables
        of_sets = {task: tables.by_set(gradient) for task, gradient in gradients.items()}
        main = []
        for each, zeros in zip(tables.sets, tables.by_set(none).values(), strict=True):
            parts = [of_set[each.name] for task, of_set in of_sets.items() if task not in each.lanes]
            main.append(reduce(add, parts) if parts else zeros)
        return [
            Pull(self.group, self.inside, side_by_side(main)),
            *(
                Pull(
                    f"{self.group}, task {task}", inside, tables.lane_columns(task, gradients.get(task, none))
                )
                for task, inside in self.lanes.items()
            ),
        ]


class Pull(NamedTuple):
    """Where a backward pass into the tables starts: vectors as tables returned them, and their gradient.

    `name`: of the group, and of the task whose lane it is, for messages.
    """

    name: str
    inside: Tensor
    gradient: Tensor


class Lookups(nn.Module):
    """Turns what collections return into tensors [B, width], features in the order of each group.

    Lanes of a group are added up.

    Args:
        groups: by name; each says in what order its features come and whether they are added up.

    Attributes:
        frozen: groups whose tables stay as they are for a while: no gradient reaches them.
    """

    def __init__(self, groups: Mapping[str, TableGroup]) -> None:
        super().__init__()
        self.groups = dict(groups)
        self.frozen: frozenset[str] = frozenset()
        self._cuts: list[Cut] | None = None

    def stays(self, name: str) -> bool:
        """Whether no gradient reaches a group: it is frozen, or its rows are given."""
        return name in self.frozen or self.groups[name].given

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
            inside, lanes = group.fuse_lanes(vectors_in_order(keyed, group.keys))
            vectors[name] = group.add_lanes(inside, lanes)
            if self.stays(name):
                vectors[name] = vectors[name].detach()
            elif self._cuts is not None and torch.is_grad_enabled():
                outside = vectors[name].detach().requires_grad_()
                self._cuts.append(Cut(name, inside, outside, lanes, group))
                vectors[name] = outside
        return vectors
