"""Matrices of a version: written whole or as a delta against a base, and put together again.

A delta holds the rows whose stored bytes differ from the base's, found by comparing all of them while they
stream past. That is exact, and needs no book-keeping while training: keeping track of touched rows would save
reading the base, but not reading the checkpoint, and would count rows that ended up as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from embeddings.errors import SnapshotError
from embeddings.lookup.stored import TORCH_DTYPES, Dtype, row_bytes, stored_columns, to_stored
from trainer.checkpoint.tensor_stream import TensorStream
from trainer.snapshot.manifest import StoredRows
from trainer.snapshot.tensors import read_one

# Called once or twice: (first row, float rows [n, dim]), ascending without gaps.
RowSource = Callable[[], Iterator[tuple[int, Tensor]]]
# Rows that are converted and compared at once.
_BLOCK = 1 << 16
_IDS, _ID_BYTES = "ids", 8


def write_rows(
    folder: Path, stem: str, name: str, shape: tuple[int, int], dtype: Dtype, source: RowSource
) -> StoredRows:
    """Write a matrix [rows, dim] whole, a block at a time.

    Raises:
        SnapshotError: it holds numbers that `dtype` cannot hold.
    """
    rows, dim = shape
    row = TORCH_DTYPES[dtype], (stored_columns(dim, dtype),)
    with TensorStream(_file(folder, stem), {name: row}) as stream:
        for _, block in _blocks(folder / stem, name, dtype, source):
            stream.append(name, block)
    return StoredRows(rows=rows, dim=dim, dtype=dtype)


def write_changes(
    folder: Path, stem: str, name: str, shape: tuple[int, int], dtype: Dtype, source: RowSource, base: Tensor
) -> StoredRows:
    """Write what differs from `base` (stored rows of the same width and type), or all where that is smaller.

    Takes 8 bytes of memory for each changed row, besides a block.
    """
    rows, dim = shape
    changed = []
    row = TORCH_DTYPES[dtype], (stored_columns(dim, dtype),)
    with TensorStream(_file(folder, stem), {name: row}) as stream:
        for first, block in _blocks(folder / stem, name, dtype, source):
            ids = _different(block, base[first : first + block.shape[0]])
            stream.append(name, block[ids])
            changed.append(ids + first)
    ids = torch.cat(changed)
    if ids.numel() * (_ID_BYTES + row_bytes(dim, dtype)) >= rows * row_bytes(dim, dtype):
        return write_rows(folder, stem, name, shape, dtype, source)
    with TensorStream(_file(folder, f"{stem}.ids"), {_IDS: (torch.int64, ())}) as stream:
        stream.append(_IDS, ids)
    return StoredRows(rows=rows, dim=dim, dtype=dtype, base_rows=base.shape[0], changed=ids.numel())


def read_rows(versions: Sequence[tuple[Path, StoredRows]], stem: str, name: str) -> Tensor:
    """Stored rows from the version that holds them whole, brought up to date by the deltas after it.

    Whole rows are memory-mapped; pages that a delta changes become private to the process. A matrix that
    grew is copied.

    Args:
        versions: (folder, description), oldest first; the first is whole, the others are not.

    Raises:
        SnapshotError: a file does not hold what its manifest says, or a delta does not fit what it follows.
    """
    whole = None
    for path, stored in versions:
        shape = (stored.held, stored_columns(stored.dim, stored.dtype))
        rows = read_one(path, f"{stem}.safetensors", name, TORCH_DTYPES[stored.dtype], shape)
        if whole is None:
            whole = rows
            continue
        ids = read_one(path, f"{stem}.ids.safetensors", _IDS, torch.int64, (stored.held,))
        problem = _misfit(whole, rows, ids, stored)
        if problem:
            raise SnapshotError(path / f"{stem}.ids.safetensors", problem)
        whole = _apply(whole, rows, ids, stored.rows)
    if whole is None:
        raise SnapshotError(stem, "no version holds it whole")
    return whole


def _misfit(whole: Tensor, rows: Tensor, ids: Tensor, stored: StoredRows) -> str:
    before = whole.shape[0]
    if stored.base_rows != before or rows.shape[1:] != whole.shape[1:] or rows.dtype != whole.dtype:
        return "is a delta against something else"
    if ids.numel() and (ids[0] < 0 or ids[-1] >= stored.rows or (ids.diff() <= 0).any()):
        return "names rows that are not there, or not in ascending order"
    grown = max(0, stored.rows - before)
    if int((ids >= before).sum()) != grown:
        return "leaves new rows without values"
    return ""


def _apply(whole: Tensor, rows: Tensor, ids: Tensor, count: int) -> Tensor:
    if count > whole.shape[0]:
        whole = torch.cat([whole, whole.new_empty(count - whole.shape[0], whole.shape[1])])
    whole = whole[:count]
    whole[ids] = rows
    return whole


def _different(block: Tensor, base: Tensor) -> Tensor:
    """Rows whose bytes differ, ascending; rows beyond the base are all different."""
    common = base.shape[0]
    same = torch.zeros(block.shape[0], dtype=torch.bool)
    same[:common] = (block[:common].view(torch.uint8) == base.view(torch.uint8)).all(1)
    return torch.nonzero(~same).squeeze(1)


def _blocks(where: Path, name: str, dtype: Dtype, source: RowSource) -> Iterator[tuple[int, Tensor]]:
    for begin, band in source():
        for first, rows in zip(range(begin, begin + len(band), _BLOCK), band.split(_BLOCK), strict=True):
            try:
                yield first, to_stored(rows, dtype)
            except ValueError as error:
                place = f"{name}, rows {first:,} to {first + len(rows) - 1:,}"
                raise SnapshotError(where, f"{place}: {error}; choose a wider type") from None


def _file(folder: Path, stem: str) -> Path:
    return folder / f"{stem}.safetensors"
