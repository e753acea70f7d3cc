"""Matrices of a version: written whole or as a delta, read memory-mapped and checked, and put together again.

A delta holds the rows whose stored bytes differ from the base's, found by comparing all of them while both
stream past. That is exact, and needs no book-keeping while training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor

from embeddings.errors import SnapshotError
from embeddings.lookup.stored import (
    TORCH_DTYPES,
    Dtype,
    PatchedRows,
    StoredTable,
    row_bytes,
    rows_at,
    stored_columns,
    to_stored,
)
from trainer.checkpoint.tensor_stream import TensorStream
from trainer.snapshot.manifest import SnapshotFile, StoredRows
from trainer.snapshot.matrix_file import IDS, LARGEST_HEADER, LayeredReader, map_one

# Called once or twice: (first row, float rows [n, dim]), ascending without gaps.
RowSource = Callable[[], Iterator[tuple[int, Tensor]]]
# Rows that are converted and compared at once: at most so many, and so many bytes as floats.
_BLOCK, _BLOCK_BYTES = 1 << 16, 8 << 20
_ID_BYTES = 8
# Ids that are compared with each other at once.
_MANY_IDS = 1 << 20
# Bytes of a file that is read instead of mapped.
_SMALL = 1 << 20


class Written(NamedTuple):
    """A matrix in a version, and the files that hold it."""

    stored: StoredRows
    files: tuple[SnapshotFile, ...]


def block_rows(dim: int) -> int:
    """Rows of `dim` floats that are worked on at once."""
    return max(1, min(_BLOCK, _BLOCK_BYTES // (4 * dim)))


def write_rows(
    folder: Path, stem: str, name: str, shape: tuple[int, int], dtype: Dtype, source: RowSource
) -> Written:
    """Write a matrix [rows, dim] whole, a block at a time.

    Raises:
        SnapshotError: it holds numbers that `dtype` cannot hold.
    """
    rows, dim = shape
    row, path = (TORCH_DTYPES[dtype], (stored_columns(dim, dtype),)), f"{stem}.safetensors"
    with TensorStream(folder / path, {name: row}, rows) as stream:
        for _, block in _blocks(folder / stem, name, dtype, source):
            stream.append(name, block)
    return Written(StoredRows(rows=rows, dim=dim, dtype=dtype), (SnapshotFile(path=path, **stream.entry),))


def write_changes(
    folder: Path,
    stem: str,
    name: str,
    shape: tuple[int, int],
    dtype: Dtype,
    source: RowSource,
    base: LayeredReader,
) -> Written:
    """Write what differs from `base` (rows of the same width and type), or all where that is smaller.

    Takes the memory of some blocks, however many rows have changed. The base's files are read once, and are
    checked when this returns, unless all was written.
    """

    def changes() -> Iterator[tuple[Tensor, Tensor]]:
        for first, block in _blocks(folder / stem, name, dtype, source):
            known = base.take(min(block.shape[0], max(base.rows - first, 0)))
            ids = _different(block, known)
            yield ids + first, block[ids]
        base.finish()

    written = _write_delta(folder, stem, name, shape, dtype, base.rows, changes())
    return written or write_rows(folder, stem, name, shape, dtype, source)


def write_touched(
    folder: Path,
    stem: str,
    name: str,
    shape: tuple[int, int],
    dtype: Dtype,
    touched: Iterator[tuple[Tensor, Tensor]],
    base: StoredTable,
) -> Written | None:
    """Write what differs from `base`, which has as many rows, where it is known which rows may.

    The same files as by `write_changes`, and the work of the touched rows alone.

    Args:
        touched: (ids ascending, float rows), some at once; no other row has changed.

    Returns:
        None where a delta would be larger than the matrix; then nothing is left in the folder.
    """
    rows, dim = shape

    def changes() -> Iterator[tuple[Tensor, Tensor]]:
        for ids, found in touched:
            for some, part in zip(*(t.split(block_rows(dim)) for t in (ids, found)), strict=True):
                stored = _stored(folder / stem, name, dtype, int(some[0]), part)
                differ = _different(stored, rows_at(base, some))
                yield some[differ], stored[differ]

    return _write_delta(folder, stem, name, shape, dtype, rows, changes())


def _write_delta(
    folder: Path,
    stem: str,
    name: str,
    shape: tuple[int, int],
    dtype: Dtype,
    base_rows: int,
    changes: Iterator[tuple[Tensor, Tensor]],
) -> Written | None:
    """Write the rows that differ from a base of so many rows.

    Args:
        changes: (ids ascending, stored rows), some at once.

    Returns:
        None where a delta would be larger than the matrix; then nothing is left in the folder.
    """
    rows, dim = shape
    row = TORCH_DTYPES[dtype], (stored_columns(dim, dtype),)
    paths = f"{stem}.safetensors", f"{stem}.ids.safetensors"
    most, changed = _most_changed(rows, dim, dtype), 0
    with ExitStack() as open_files:
        stream = open_files.enter_context(TensorStream(folder / paths[0], {name: row}))
        ids_stream = open_files.enter_context(TensorStream(folder / paths[1], {IDS: (torch.int64, ())}))
        for ids, block in changes:
            changed += ids.numel()
            if changed > most:
                break
            stream.append(name, block)
            ids_stream.append(IDS, ids)
    if changed > most:
        for path in paths:
            (folder / path).unlink()
        return None
    stored = StoredRows(rows=rows, dim=dim, dtype=dtype, base_rows=base_rows, changed=changed)
    entries = zip(paths, (stream.entry, ids_stream.entry), strict=True)
    return Written(stored, tuple(SnapshotFile(path=path, **entry) for path, entry in entries))


def _most_changed(rows: int, dim: int, dtype: Dtype) -> int:
    """Beyond so many rows, a delta would be larger than the matrix."""
    size = row_bytes(dim, dtype)
    return -(-rows * size // (_ID_BYTES + size)) - 1


def _different(block: Tensor, known: Tensor) -> Tensor:
    """The places of rows whose bytes are not those of `known`, which may be shorter."""
    # As few and wide words as fill a row: their comparison is what an export of few changes does most.
    size = block.shape[1] * block.element_size()
    kinds = (torch.int64, torch.int32, torch.int16, torch.uint8)
    word = next(kind for kind in kinds if size % kind.itemsize == 0)
    differ = torch.ones(block.shape[0], dtype=torch.bool)
    differ[: len(known)] = (block[: len(known)].view(word) != known.view(word)).any(1)
    return torch.nonzero(differ).squeeze(1)


def read_rows(versions: Sequence[tuple[Path, StoredRows]], stem: str, name: str) -> StoredTable:
    """Stored rows from the version that holds them whole, and the deltas after it laid over.

    All are memory-mapped, and nothing is copied.

    Args:
        versions: (folder, description), oldest first; the first is whole, the others are not.

    Raises:
        SnapshotError: a file does not hold what its manifest says, or a delta does not fit what it follows.
    """
    whole, patches, rows = None, [], 0
    for path, stored in versions:
        shape = (stored.held, stored_columns(stored.dim, stored.dtype))
        found = map_one(path / f"{stem}.safetensors", name, TORCH_DTYPES[stored.dtype], shape)
        if whole is None:
            whole = found
        else:
            file = path / f"{stem}.ids.safetensors"
            ids = map_one(file, IDS, torch.int64, (stored.held,))
            like = found.shape[1:] == whole.shape[1:] and found.dtype == whole.dtype
            problem = _misfit(rows, ids, stored) if like else "is a delta against something else"
            if problem:
                raise SnapshotError(file, problem)
            patches.append((ids, found))
        rows = stored.rows
    if whole is None:
        raise SnapshotError(stem, "no version holds it whole")
    return PatchedRows(rows, whole, patches) if patches else whole


def _misfit(before: int, ids: Tensor, stored: StoredRows) -> str:
    """What is wrong with the ids of a delta, read some at a time; empty if nothing is."""
    if stored.base_rows != before:
        return "is a delta against something else"
    last, beyond = -1, 0
    for part in ids.split(_MANY_IDS) if ids.numel() else ():
        if part[0] <= last or part[-1] >= stored.rows or (part.diff() <= 0).any():
            return "names rows that are not there, or not in ascending order"
        last = int(part[-1])
        beyond += int((part >= before).sum())
    return "leaves new rows without values" if beyond != max(0, stored.rows - before) else ""


def _blocks(where: Path, name: str, dtype: Dtype, source: RowSource) -> Iterator[tuple[int, Tensor]]:
    for begin, band in source():
        size = block_rows(band.shape[1])
        for first, rows in zip(range(begin, begin + len(band), size), band.split(size), strict=True):
            yield first, _stored(where, name, dtype, first, rows)


def _stored(where: Path, name: str, dtype: Dtype, first: int, rows: Tensor) -> Tensor:
    try:
        return to_stored(rows, dtype)
    except ValueError as error:
        place = f"{name}, rows {first:,} to {first + len(rows) - 1:,}"
        raise SnapshotError(where, f"{place}: {error}; choose a wider type") from None


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a file: a small file is read, a larger one is memory-mapped copy-on-write.

    For every tensor of a file that it maps, safetensors (0.8.0) keeps two numbers for good. So a server does
    not map those files of each version that have many small tensors.

    Raises:
        SnapshotError: it is no safetensors file, or has an absurd header.
    """
    file = path / name
    try:
        with file.open("rb") as raw:
            if int.from_bytes(raw.read(8), "little") > LARGEST_HEADER:
                raise SnapshotError(file, f"its header is larger than {LARGEST_HEADER:,} bytes")
        small = file.stat().st_size <= _SMALL
        tensors: dict[str, Tensor] = load(file.read_bytes()) if small else load_file(file)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise SnapshotError(file, f"unreadable: {error}") from None
    return tensors


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
