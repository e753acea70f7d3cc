"""Which rows of this rank's tables training has looked up: one bit a row.

Rows change only in the backward pass of a lookup (see `embeddings.optimizers`): no table is decayed, and the
optimizer's state of a row changes with the row alone. So what was looked up with gradients on is all that can
have changed, and more: a row stays as it was where its gradient is zero, or where the guard undid a step.

TorchRec has a tracker (`torchrec.distributed.model_tracker`, 1.8). It keeps every id of every batch as an
int64 until it is asked, whose memory has no bound; it knows one table a feature and drops the others, where
groups and sets have several; and it also counts what an evaluation looks up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from embeddings.private import KernelTable, kernel_tables, lookups

# 2^3 rows share a byte.
_BYTE = 3


class ShardKey(NamedTuple):
    """A shard of a table on this rank, by its first row and column of the whole table."""

    table: str
    row: int
    column: int


# Shard -> uint8 [ceil(rows / 8)], row r is bit r % 8 of byte r // 8.
Bits = Mapping[ShardKey, Tensor]


def watch(model: nn.Module, seen: Callable[[ShardKey, Tensor], None]) -> dict[ShardKey, int]:
    """Have a function called before each lookup of a sharded model with gradients on.

    Data-parallel tables are left out: their whole gradients may change every row.

    Args:
        model: whose kernels are watched from now on.
        seen: called with a shard of this rank and the rows of it that are looked up, which may repeat.

    Returns:
        The rows of every shard that is watched.
    """
    rows: dict[ShardKey, int] = {}

    def before(tables: list[KernelTable], kernel: nn.Module, given: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled():
            return
        features = given[0]
        ids, begins = features.values(), features.offset_per_key()
        at = 0
        for table in tables:
            begin, end = begins[at], begins[at + table.features]
            at += table.features
            if end > begin and table.rows:
                seen(_key(table), ids[begin:end])

    for module in list(model.modules()):
        for lookup in lookups(module):
            for kernel in lookup.modules():
                tables = kernel_tables(kernel)
                # A shard without rows begins where another one does.
                rows |= {_key(table): table.rows for table in tables if table.rows}
                if tables:
                    kernel.register_forward_pre_hook(partial(before, tables))
    return rows


class TouchedRows:
    """Marks the rows that a sharded model looks up while gradients are on.

    Args:
        model: see `watch`.

    Attributes:
        rows: of every shard that is watched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._bits: dict[ShardKey, Tensor] = {}
        self.rows = watch(model, self.add)

    def take(self) -> dict[ShardKey, Tensor]:
        """What was marked since the last call, of every shard; marks begin anew."""
        taken, self._bits = self._bits, {}
        return {key: taken.get(key, empty_bits(rows)) for key, rows in self.rows.items()}

    def add(self, key: ShardKey, ids: Tensor) -> None:
        """Mark rows of a shard, which may repeat; also for what else than training changes rows."""
        if key not in self._bits:
            self._bits[key] = empty_bits(self.rows[key], ids.device)
        mark(self._bits[key], ids.to(self._bits[key].device))


def empty_bits(rows: int, device: torch.device | None = None) -> Tensor:
    return torch.zeros(-(-rows // 8), dtype=torch.uint8, device=device)


def mark(bits: Tensor, ids: Tensor, waits: bool | None = None) -> None:
    """Set the bits of rows, which may repeat.

    Args:
        waits: the host may wait for the device, and only those bytes are looked at that change; None: on a
            CPU.
    """
    at, place = ids.long() >> _BYTE, ids & 7
    for bit in range(8):
        if ids.is_cpu if waits is None else waits:
            here = at[place == bit]
            bits[here] = bits[here] | (1 << bit)
        else:
            # Of two writers of a byte, the one that sets the bit has the larger number.
            old = bits[at]
            bits.scatter_reduce_(0, at, torch.where(place == bit, old | (1 << bit), old), "amax")


def _key(table: KernelTable) -> ShardKey:
    return ShardKey(table.name, table.row, table.column)
