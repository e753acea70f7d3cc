"""Matrices of a version: written whole or as a delta, read memory-mapped and checked, and put together again.

A delta holds the rows whose stored bytes differ from the base's, found by comparing all of them while they
stream past. That is exact, and needs no book-keeping while training: keeping track of touched rows would save
reading the base, but not reading the checkpoint, and would count rows that ended up as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from embeddings.errors import SnapshotError
from embeddings.lookup.stored import TORCH_DTYPES, Dtype, row_bytes, stored_columns, to_stored
from trainer.checkpoint.tensor_stream import TensorStream
from trainer.snapshot.manifest import StoredRows

# Called once or twice: (first row, float rows [n, dim]), ascending without gaps.
RowSource = Callable[[], Iterator[tuple[int, Tensor]]]
# Rows that are converted and compared at once.
_BLOCK = 1 << 16
_IDS, _ID_BYTES = "ids", 8
# Far more than any file here needs; a header of 100 MB would take seconds and gigabytes to parse.
_LARGEST_HEADER = 1 << 20


def write_rows(
    folder: Path, stem: str, name: str, shape: tuple[int, int], dtype: Dtype, source: RowSource
) -> StoredRows:
    """Write a matrix [rows, dim] whole, a block at a time.

    Raises:
        SnapshotError: it holds numbers that `dtype` cannot hold.
    """
    rows, dim = shape
    row = TORCH_DTYPES[dtype], (stored_columns(dim, dtype),)
    with TensorStream(folder / f"{stem}.safetensors", {name: row}) as stream:
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
    with TensorStream(folder / f"{stem}.safetensors", {name: row}) as stream:
        for first, block in _blocks(folder / stem, name, dtype, source):
            # Rows whose bytes differ; rows beyond the base are all different.
            known = base[first : first + block.shape[0]]
            same = torch.zeros(block.shape[0], dtype=torch.bool)
            same[: len(known)] = (block[: len(known)].view(torch.uint8) == known.view(torch.uint8)).all(1)
            ids = torch.nonzero(~same).squeeze(1)
            stream.append(name, block[ids])
            changed.append(ids + first)
    ids = torch.cat(changed)
    if ids.numel() * (_ID_BYTES + row_bytes(dim, dtype)) >= rows * row_bytes(dim, dtype):
        return write_rows(folder, stem, name, shape, dtype, source)
    with TensorStream(folder / f"{stem}.ids.safetensors", {_IDS: (torch.int64, ())}) as stream:
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
        if stored.rows > whole.shape[0]:
            whole = torch.cat([whole, whole.new_empty(stored.rows - whole.shape[0], whole.shape[1])])
        whole = whole[: stored.rows]
        whole[ids] = rows
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


def _blocks(where: Path, name: str, dtype: Dtype, source: RowSource) -> Iterator[tuple[int, Tensor]]:
    for begin, band in source():
        for first, rows in zip(range(begin, begin + len(band), _BLOCK), band.split(_BLOCK), strict=True):
            try:
                yield first, to_stored(rows, dtype)
            except ValueError as error:
                place = f"{name}, rows {first:,} to {first + len(rows) - 1:,}"
                raise SnapshotError(where, f"{place}: {error}; choose a wider type") from None


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a file, memory-mapped copy-on-write.

    Raises:
        SnapshotError: it is no safetensors file, or has an absurd header.
    """
    file = path / name
    try:
        with file.open("rb") as raw:
            if int.from_bytes(raw.read(8), "little") > _LARGEST_HEADER:
                raise SnapshotError(file, f"its header is larger than {_LARGEST_HEADER:,} bytes")
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise SnapshotError(file, f"unreadable: {error}") from None
    return tensors


def read_one(path: Path, file: str, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The one tensor of a file.

    Raises:
        SnapshotError: it holds anything but that tensor.
    """
    tensors = read_tensors(path, file)
    if list(tensors) != [name]:
        raise SnapshotError(path / file, f"should hold the one tensor {name!r}")
    found = tensors[name]
    if found.dtype != dtype or tuple(found.shape) != shape:
        kinds = f"{found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}"
        raise SnapshotError(path / file, f"holds {kinds}")
    return found


def expect_like(path: Path, file: str, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Tensors must have the names, types and shapes of others, and be finite.

    Raises:
        SnapshotError: naming the first that has not.
    """
    missing, surplus = sorted(like.keys() - tensors.keys()), sorted(tensors.keys() - like.keys())
    for names, what in ((missing, "missing"), (surplus, "superfluous")):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise SnapshotError(path / file, f"does not fit the config: {names[0]}{others} {what}")
    for name, wanted in like.items():
        found = tensors[name]
        if found.dtype != wanted.dtype or found.shape != wanted.shape:
            kinds = f"{found.dtype} {list(found.shape)}, expected {wanted.dtype} {list(wanted.shape)}"
            raise SnapshotError(path / file, f"does not fit the config: {name} is {kinds}")
        if found.is_floating_point() and not found.isfinite().all():
            raise SnapshotError(path / file, f"{name} holds numbers that are not finite")
