"""Rows that are given to new ids begin as a new table's rows do, wherever they lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from embeddings.first_rows import FirstWeights, initial_rows_at_
from embeddings.groups import TableGroup
from embeddings.ids.bucket_map import Int64s
from embeddings.lookup.touched import ShardKey, TouchedRows


class _Shard(NamedTuple):
    """A shard of a table on this rank; `first`: None where rows begin as zeros; `seed`: of first weights."""

    key: ShardKey
    parts: tuple[Tensor, ...]
    first: FirstWeights | None
    seed: int


class NewRows:
    """Writes first weights and empty optimizer state into this rank's shards of tables.

    A row gets the weights that it had in the new table (`embeddings.first_rows`), so that they depend on the
    seed, the table and the row alone. Rows of lanes begin as zeros, as they do in a new table.

    Args:
        groups: whose tables, of all sets and lanes; seed: of the whole run.
        parts: of each shard of a table on this rank, the tensors with a row for each of its rows: weights
            first, then the optimizer's state. They are written to in place.
        touched: told of every row that is written, so that an incremental checkpoint has it.
    """

    def __init__(
        self,
        groups: Iterable[TableGroup],
        seed: int,
        parts: Mapping[ShardKey, Sequence[Tensor]],
        touched: TouchedRows | None = None,
    ) -> None:
        self._touched = touched
        tables = {
            group.table_name(table): (
                table.key,
                None if table.lane else group.first,
                group.first_seed(seed, group.table_name(table)),
            )
            for group in groups
            for table in group.all_tables
        }
        self._shards: dict[str, list[_Shard]] = {}
        for key, tensors in parts.items():
            if key.table in tables:
                name, first, of_table = tables[key.table]
                self._shards.setdefault(name, []).append(_Shard(key, tuple(tensors), first, of_table))

    def begin(self, new_rows: Mapping[str, Int64s]) -> None:
        """Have rows begin anew, before the lookup of the step that gave them to new ids.

        Args:
            new_rows: name of a map -> rows of the tables that are looked up by it, ascending, each once,
                whatever rank they lie on.
        """
        for name, rows in new_rows.items():
            for shard in self._shards.get(name, ()) if rows.size else ():
                begin, stop = np.searchsorted(rows, (shard.key.row, shard.key.row + len(shard.parts[0])))
                if stop > begin:
                    self._write(shard, torch.from_numpy(rows[begin:stop] - shard.key.row))

    @torch.no_grad()
    def _write(self, shard: _Shard, rows: Tensor) -> None:
        """`rows`: int64 [n], where the shard's first row is 0."""
        key, (weights, *states) = shard.key, (part.detach() for part in shard.parts)
        rows = rows.to(weights.device)
        if shard.first is None:
            weights[rows] = 0
        else:
            initial_rows_at_(weights, rows, shard.seed, shard.first, key.row, key.column)
        for state in states:
            state[rows.to(state.device)] = 0
        if self._touched is not None:
            self._touched.add(key, rows)
