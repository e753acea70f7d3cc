"""The gradients of looked-up vectors and of table rows, each told apart by the role that it comes from.

A row of a table serves the search (*attention*: it decides which behaviors are kept, and with which weights)
or the sequence models (*representation*: it is what is pooled), or both. Which of them a part of a gradient
comes from is known where vectors enter the two stages of the model: at `model.branches` and `model.pooling`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from embeddings.groups import TableGroup, TableSpec
from trainer.data.batch import RequestBatch
from trainer.model.frame import Retrievals, TwoStageModel

ATTENTION, REPRESENTATION = "attention", "representation"
ROLES = (ATTENTION, REPRESENTATION)


@dataclass
class RoleGradient:
    """What one role does to the vectors of one lookup.

    Attributes:
        role: of `ROLES`; group: the name of the table group.
        bags: whose vectors they are; gradient: [bags, width], None where no backward pass has come by.
    """

    role: str
    group: str
    bags: KeyedJaggedTensor
    gradient: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Called by the backward pass, once for each place that reads the vectors."""
        # A copy: autograd may add other gradients to its own tensor in place.
        self.gradient = gradient.clone() if self.gradient is None else self.gradient + gradient


class _Copies(Mapping[str, Tensor]):
    """Vectors by group; whoever reads one is given a view of its own, whose gradient is taken down.

    A view for each reader, and not one for all: else the gradients of several readers would be added up in
    another order than without anybody watching, and training would not stay the same to the bit.

    Args:
        taken: where a group that is read for the first time is added.
    """

    def __init__(
        self,
        role: str,
        vectors: Mapping[str, Tensor],
        bags: Mapping[str, KeyedJaggedTensor],
        taken: list[RoleGradient],
    ) -> None:
        self._role, self._vectors, self._bags, self._taken = role, vectors, bags, taken
        self._own: dict[str, RoleGradient] = {}

    def __getitem__(self, group: str) -> Tensor:
        vectors = self._vectors[group]
        if not vectors.requires_grad:
            return vectors
        if group not in self._own:
            self._own[group] = RoleGradient(self._role, group, self._bags[group])
            self._taken.append(self._own[group])
        copy = vectors.view_as(vectors)
        copy.register_hook(self._own[group].add)
        return copy

    def __iter__(self) -> Iterator[str]:
        return iter(self._vectors)

    def __len__(self) -> int:
        return len(self._vectors)


class RoleGradients:
    """Takes down gradients by role, of the forward passes within `taking`; others are as without it.

    Vectors of context and of a prior, which no search reads, count as representation.

    Args:
        model: over tables of whatever kind, sharded or not.
    """

    def __init__(self, model: TwoStageModel) -> None:
        self._model, self._taken = model, list[RoleGradient]()
        self._on = False
        model.branches.register_forward_pre_hook(partial(self._before_stage_one))
        model.pooling.register_forward_pre_hook(partial(self._before_stage_two))

    @contextmanager
    def taking(self) -> Iterator[list[RoleGradient]]:
        """Gives a list to which the forward passes within add what their backward passes then fill in."""
        self._taken, self._on = [], True
        try:
            yield self._taken
        finally:
            self._on = False

    def _first_bags(self, batch: RequestBatch, vectors: Mapping[str, Tensor]) -> dict[str, KeyedJaggedTensor]:
        of_requests = self._model.of_requests
        return {group: batch.context if group in of_requests else batch.features for group in vectors}

    def _before_stage_one(self, _: Any, given: tuple[RequestBatch, Mapping[str, Tensor]]) -> Any:
        if not self._on:
            return None
        batch, vectors = given
        copies = _Copies(ATTENTION, vectors, self._first_bags(batch, vectors), self._taken)
        return batch, copies

    def _before_stage_two(
        self, _: Any, given: tuple[RequestBatch, Retrievals, Mapping[str, Tensor], Mapping[str, Tensor]]
    ) -> Any:
        if not self._on:
            return None
        batch, retrievals, first, late = given
        alone = self._model.alone
        late_bags = {group: retrievals.candidates if group in alone else retrievals.bags for group in late}
        firsts = _Copies(REPRESENTATION, first, self._first_bags(batch, first), self._taken)
        return batch, retrievals, firsts, _Copies(REPRESENTATION, late, late_bags, self._taken)


def table_columns(group: TableGroup) -> Iterator[tuple[TableSpec, slice]]:
    """Each main table of a group, and the columns of the group's vectors that its rows reach."""
    start = 0
    for each in group.sets:
        tables = group.of_set(each.name).tables
        for place, table in enumerate(tables):
            yield table, slice(start, start + table.dim)
            if group.fusion == "concat" or place == len(tables) - 1:
                start += table.dim


def row_gradients(bags: JaggedTensor, gradient_BD: Tensor, rows_R: Tensor) -> Tensor:
    """The gradients of some rows of a table, float64 [R, D]: sums over the bags that they are in.

    Args:
        bags: ids of one feature, B bags; gradient_BD: of the bags' vectors.
        rows_R: int64, ascending, each once.
    """
    found = torch.zeros(len(rows_R), gradient_BD.shape[1], dtype=torch.float64, device=gradient_BD.device)
    ids, lengths = bags.values().long(), bags.lengths().long()
    if not len(rows_R) or not len(ids):
        return found
    place = torch.searchsorted(rows_R, ids).clamp(max=len(rows_R) - 1)
    chosen = rows_R[place] == ids
    bag = torch.repeat_interleave(torch.arange(len(lengths), device=ids.device), lengths)
    return found.index_add_(0, place[chosen], gradient_BD[bag[chosen]].double())


def of_tables(
    taken: Sequence[RoleGradient], groups: Mapping[str, TableGroup], rows: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Table -> role -> gradients of its rows, float64 [R, dim], of this rank's bags.

    A table has those roles that have read its group, whether a gradient has come by or not: ranks agree.

    Args:
        rows: key of a table (`TableSpec.key`) -> rows to look at, int64 [R], ascending.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for each in taken:
        group = groups[each.group]
        for spec, columns in table_columns(group):
            of_table = found.setdefault(group.table_name(spec), {})
            if each.gradient is None:
                gradient = rows[spec.key].new_zeros(len(rows[spec.key]), spec.dim, dtype=torch.float64)
            else:
                gradient = row_gradients(each.bags[spec.key], each.gradient[:, columns], rows[spec.key])
            of_table[each.role] = of_table[each.role] + gradient if each.role in of_table else gradient
    return found
