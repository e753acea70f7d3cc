"""Rows of a table as they are stored for serving: fp32, fp16, or one byte a number with a scale for each row.

    fp32, fp16   [rows, dim]
    int8         uint8 [rows, dim + 8]: dim codes, then scale and smallest value of the row, float32 each;
                 FBGEMM's fused 8-bit row-wise format. x = code * scale + smallest.

The type of a stored tensor says which of the three it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# Its import registers the operators under torch.ops.fbgemm.
import fbgemm_gpu  # noqa: F401
import torch
from torch import Tensor
from torch.nn import functional as F

Dtype = Literal["fp32", "fp16", "int8"]
# From narrow to wide.
WIDTHS: tuple[Dtype, ...] = ("int8", "fp16", "fp32")
TORCH_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "int8": torch.uint8}
_SCALE_AND_SMALLEST = 8


def stored_columns(dim: int, dtype: Dtype) -> int:
    """Columns of the stored tensor of rows of `dim` numbers."""
    return dim + _SCALE_AND_SMALLEST if dtype == "int8" else dim


def row_bytes(dim: int, dtype: Dtype) -> int:
    """Bytes of one stored row."""
    return stored_columns(dim, dtype) * TORCH_DTYPES[dtype].itemsize


def to_stored(rows: Tensor, dtype: Dtype) -> Tensor:
    """Float rows [n, dim] -> stored rows [n, stored_columns].

    Raises:
        ValueError: a number is not finite, or too large for `dtype`.
    """
    if dtype != "int8":
        stored = rows.to(TORCH_DTYPES[dtype])
        good = stored.isfinite().all()
    else:
        stored = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(rows.float().contiguous())
        # A NaN can vanish in the codes, an infinite range shows in the scale.
        # A copy, for the one row of a block may begin anywhere.
        scales = (
            stored[:, -_SCALE_AND_SMALLEST:].clone(memory_format=torch.contiguous_format).view(torch.float32)
        )
        good = rows.isfinite().all() & scales.isfinite().all()
    if not good:
        raise ValueError(f"holds a number that is not finite, or too large for {dtype}")
    return stored.contiguous()


class RowStore(ABC):
    """A stored table [rows, columns] whose rows are put together when they are asked for."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @abstractmethod
    def index_select(self, ids: Tensor) -> Tensor:
        """Stored rows [n, columns] of ids [n]; IndexError for one outside of the table."""


@dataclass(frozen=True)
class PatchedRows(RowStore):
    """A stored table [rows, columns] as it was, and the rows that changed since; nothing is put together.

    Looking up takes one binary search in each patch, and no memory but that of the rows that are asked for:
    writing changes into a memory-mapped table would copy a page of 4 KiB for each row.

    Attributes:
        rows: of the table now, which may be more or fewer than `whole` has.
        patches: oldest first, (ids, rows): ids ascending, below `rows` of their time. An id beyond `whole` is
            in one of them.
    """

    rows: int
    whole: Tensor
    patches: Sequence[tuple[Tensor, Tensor]]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.rows, self.whole.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    def index_select(self, ids: Tensor) -> Tensor:
        """Stored rows [n, columns] of ids [n]; IndexError for one outside of the table."""
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.rows):
            raise IndexError(f"an id lies outside [0, {self.rows})")
        found = self.whole.index_select(0, ids.clamp(max=self.whole.shape[0] - 1))
        for changed, rows in self.patches:
            if changed.numel():
                at = torch.searchsorted(changed, ids).clamp_(max=changed.numel() - 1)
                hits = torch.nonzero(changed[at] == ids).squeeze(1)
                found[hits] = rows[at[hits]]
        return found


# What `sum_bags` looks rows up in.
StoredTable = Tensor | RowStore


def rows_at(stored: StoredTable, ids: Tensor) -> Tensor:
    """Stored rows [n, columns] of ids [n]."""
    return stored.index_select(ids) if isinstance(stored, RowStore) else stored.index_select(0, ids)


def sum_bags(stored: StoredTable, ids: Tensor, offsets: Tensor) -> Tensor:
    """Sums of the rows of each bag, float32 [B, dim], reading only the rows that are asked for.

    Args:
        stored: a table, possibly memory-mapped; ids: of all bags; offsets: [B + 1], where each begins.
    """
    if isinstance(stored, RowStore):
        stored, ids = stored.index_select(ids), torch.arange(ids.numel(), device=ids.device)
    if stored.dtype == torch.uint8:
        pooled: Tensor = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            stored, ids, offsets, include_last_offset=True
        )
        return pooled
    if stored.dtype == torch.float16 and bool((offsets.diff() <= 1).all()):
        # The row of a bag that holds one id is a half already: no sum is rounded.
        alone: Tensor = F.embedding_bag(ids, stored, offsets, mode="sum", include_last_offset=True)
        return alone.float()
    if stored.dtype == torch.float16:
        # Sums in float32: a kernel over halves would round each sum to a half again.
        stored, ids = stored.index_select(0, ids).float(), torch.arange(ids.numel(), device=ids.device)
    return F.embedding_bag(ids, stored, offsets, mode="sum", include_last_offset=True)
