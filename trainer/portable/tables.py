"""Rows of tables for padded ids, looked up as they are stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embeddings.groups import TableGroup
from embeddings.lookup.stored import RowStore, StoredTable
from trainer.portable.padded import PaddedBags

# Rows of a table that are put together at once where a version is a delta.
_ROWS = 1 << 18


class TableParts(NamedTuple):
    """A stored table as runtimes without FBGEMM can read it.

    Attributes:
        rows: float32 or float16 [rows, dim], or the codes of int8, uint8 [rows, dim].
        scales: of int8, float32 [rows, 2]: x = code * scale + smallest; else None.
    """

    rows: Tensor
    scales: Tensor | None


def parts_of(stored: StoredTable) -> TableParts:
    """A table's parts; the rows of fp32 and fp16 tables are the stored tensor itself, which may be mapped."""
    if isinstance(stored, RowStore):
        ids = torch.arange(stored.shape[0]).split(_ROWS)
        stored = torch.cat([stored.index_select(some) for some in ids])
    if stored.dtype != torch.uint8:
        return TableParts(stored, None)
    scales = stored[:, -8:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    return TableParts(stored[:, :-8].contiguous(), scales)


class PortableTables(nn.Module):
    """The tables of all groups.

    Args:
        groups: by name, without lanes; tables: by name, as the snapshot has them.
    """

    def __init__(self, groups: Mapping[str, TableGroup], tables: Mapping[str, StoredTable]) -> None:
        super().__init__()
        self.groups = dict(groups)
        self.names: dict[str, str] = {}
        for number, (name, stored) in enumerate(tables.items()):
            rows, scales = parts_of(stored)
            # Names of features may hold anything, those of buffers may not.
            self.names[name] = f"table_{number}"
            self.register_buffer(self.names[name], rows)
            if scales is not None:
                self.register_buffer(f"{self.names[name]}_scales", scales)

    def of_bags(self, group: str, bags: PaddedBags) -> Tensor:
        """Vectors of behaviors and candidates, or of requests: [bags, width of the group]."""
        tables = self.groups[group]
        parts = [
            self._of_table(tables.table_name(table), table.key, table.dim, bags) for table in tables.tables
        ]
        return tables.fuse(torch.cat(parts, dim=1))

    def _of_table(self, table: str, key: str, dim: int, bags: PaddedBags) -> Tensor:
        sides = []
        for ids, count in bags.sides(key):
            if ids is None:
                sides.append(torch.zeros(count, dim))
            else:
                sides.append(self._rows(table, ids))
        return sides[0] if len(sides) == 1 else torch.cat(sides)

    def _rows(self, table: str, ids: Tensor) -> Tensor:
        """Float32 [n, dim]: rows of ids [n], or sums of those of ids [n, ids], without negative ones."""
        if ids.dim() == 1:
            return self._float(table, ids)
        rows_BID = self._float(table, ids.clamp(min=0))
        return torch.where(ids[:, :, None] >= 0, rows_BID, 0.0).sum(1)

    def _float(self, table: str, ids: Tensor) -> Tensor:
        name = self.names[table]
        rows: Tensor = F.embedding(ids, getattr(self, name))
        if rows.dtype != torch.uint8:
            return rows.float()
        scales = F.embedding(ids, getattr(self, f"{name}_scales")).double()
        # FBGEMM multiplies and adds with one rounding.
        return (rows.double() * scales[..., :1] + scales[..., 1:]).float()

    def parts(self) -> Iterator[tuple[str, str]]:
        """(name of a table, name of its buffer of rows)."""
        yield from self.names.items()
