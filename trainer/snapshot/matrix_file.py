"""A safetensors file of one matrix: memory-mapped, or read once from front to back with its digest.

Its header is compared with what the manifest makes it, so that a file which claims anything else is refused
before any of it is mapped.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from embeddings.errors import SnapshotError
from embeddings.lookup.stored import TORCH_DTYPES, stored_columns
from trainer.checkpoint.tensor_stream import TYPE_NAMES
from trainer.snapshot.manifest import SEAL, ListedFile, StoredRows

IDS = "ids"
# Far more than any file here needs; a header of 100 MB would take seconds and gigabytes to parse.
LARGEST_HEADER = 1 << 20
# Ids of a delta that are held while it is laid over its base.
_SOME_IDS = 1 << 16
# MAP_NORESERVE of Linux, which the module lacks before Python 3.13. For a mapping that may be written, as
# torch wants it, the system would else promise memory, and refuse a table that is larger than the machine's.
_NO_RESERVE = 0x4000


def map_one(file: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The one tensor of a file, memory-mapped; what is written to it stays in this process.

    Rows are looked up in no order, so where a table is larger than memory the system reads the page that a
    row lies on, and no more.

    Raises:
        SnapshotError: it cannot be mapped, or holds anything but that tensor.
    """
    count = torch.Size(shape).numel()
    try:
        with file.open("rb") as raw:
            begin = _begin_of(file, raw, name, dtype, shape)
            if raw.seek(0, 2) != begin + count * dtype.itemsize:
                raise SnapshotError(file, f"has another size than its {list(shape)} numbers")
            if not count:
                return torch.empty(shape, dtype=dtype)
            kind = mmap.MAP_PRIVATE | _NO_RESERVE
            mapped = mmap.mmap(raw.fileno(), 0, flags=kind, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            mapped.madvise(mmap.MADV_RANDOM)
    except (OSError, ValueError) as error:
        raise SnapshotError(file, f"unreadable: {error}") from None
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=begin).view(shape)


class MatrixReader:
    """The rows of a file from first to last; `finish` says whether it is the file of its entry.

    Raises:
        SnapshotError: it holds anything but the matrix `name` of this type and shape.
    """

    def __init__(
        self, path: Path, entry: ListedFile, name: str, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> None:
        self.file, self._entry, self._dtype, self._row = path / entry.path, entry, dtype, shape[1:]
        self.left, self._digest = shape[0], hashlib.sha256()
        if self.file.is_symlink() or self.file.parent.is_symlink():
            raise SnapshotError(self.file, "missing, or not a plain file")
        try:
            self._raw = self.file.open("rb")
        except OSError as error:
            raise SnapshotError(self.file, f"unreadable: {error}") from None
        with ExitStack() as undo:
            undo.callback(self._raw.close)
            begin = _begin_of(self.file, self._raw, name, dtype, shape)
            self._raw.seek(0)
            self._digest.update(self._raw.read(begin))
            undo.pop_all()

    def take(self, count: int) -> Tensor:
        """The next rows [n, ...]: `count` of them, or what is left."""
        count = min(count, self.left)
        self.left -= count
        content = bytearray(count * torch.Size(self._row).numel() * self._dtype.itemsize)
        view = memoryview(content)
        read = 0
        try:
            while read < len(content) and (got := self._raw.readinto(view[read:])):
                read += got
        except OSError as error:
            raise SnapshotError(self.file, f"unreadable: {error}") from None
        if read < len(content):
            raise SnapshotError(self.file, "ends before its last row")
        self._digest.update(content)
        if not content:
            return torch.empty((0, *self._row), dtype=self._dtype)
        return torch.frombuffer(content, dtype=self._dtype).view(count, *self._row)

    def finish(self) -> None:
        """Read what is left.

        Raises:
            SnapshotError: size or digest differ from the entry's.
        """
        while piece := self._raw.read(1 << 20):
            self._digest.update(piece)
        self._raw.close()
        SEAL.check(self.file, self._entry.bytes, self._entry.sha256, lambda _: self._digest.hexdigest())

    def close(self) -> None:
        self._raw.close()


class LayeredReader:
    """The rows of a matrix from first to last: a version that holds it whole, and deltas laid over.

    Every file is read once, whatever the size of the matrix in some blocks of memory.

    Args:
        versions: (folder, the manifest's files by path, description), oldest first; the first is whole.

    Attributes:
        rows: of the newest version; files: that this reads.
    """

    def __init__(
        self, versions: Sequence[tuple[Path, dict[str, ListedFile], StoredRows]], stem: str, name: str
    ) -> None:
        self.rows, self._at = versions[-1][2].rows, 0
        self._readers: list[MatrixReader] = []
        self._layers: list[_Layer] = []
        with ExitStack() as undo:
            undo.callback(self.close)
            for path, listed, stored in versions:
                shape = (stored.held, stored_columns(stored.dim, stored.dtype))
                file, ids_file = f"{stem}.safetensors", f"{stem}.ids.safetensors"
                rows = MatrixReader(path, listed[file], name, TORCH_DTYPES[stored.dtype], shape)
                self._readers.append(rows)
                if stored.changed is None:
                    ids = None
                else:
                    ids = MatrixReader(path, listed[ids_file], IDS, torch.int64, (stored.held,))
                    self._readers.append(ids)
                self._layers.append(_Layer(rows, ids))
            undo.pop_all()

    @property
    def files(self) -> list[Path]:
        return [reader.file for reader in self._readers]

    def take(self, count: int) -> Tensor:
        """The next stored rows [count, columns]."""
        whole, *deltas = self._layers
        found = whole.rows.take(count)
        if found.shape[0] < count:
            # Rows that came later are all in deltas.
            found = torch.cat([found, found.new_empty(count - found.shape[0], found.shape[1])])
        for delta in deltas:
            ids, rows = delta.below(self._at + count)
            # Those of rows that went away again lie beyond every block.
            found[ids - self._at] = rows
        self._at += count
        return found

    def finish(self) -> None:
        """Raises SnapshotError where a file is not that of its manifest."""
        for reader in self._readers:
            reader.finish()

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


class _Layer:
    """Rows of a version, and which they are: None, where they are all."""

    def __init__(self, rows: MatrixReader, ids: MatrixReader | None) -> None:
        self.rows, self._ids = rows, ids
        self._next = torch.empty(0, dtype=torch.int64), rows.take(0)
        self._last = -1

    def below(self, stop: int) -> tuple[Tensor, Tensor]:
        """The next ids below `stop`, with their rows."""
        assert self._ids is not None
        found_ids, found_rows = [], []
        while True:
            ids, rows = self._next
            if not ids.numel():
                ids, rows = self._ids.take(_SOME_IDS), self.rows.take(_SOME_IDS)
                if ids.numel() and (ids[0] <= self._last or (ids.diff() <= 0).any()):
                    raise SnapshotError(self._ids.file, "names rows not in ascending order")
                self._last = int(ids[-1]) if ids.numel() else self._last
            count = int(torch.searchsorted(ids, stop))
            found_ids.append(ids[:count])
            found_rows.append(rows[:count])
            self._next = ids[count:], rows[count:]
            if count < ids.numel() or not ids.numel():
                return torch.cat(found_ids), torch.cat(found_rows)


def _begin_of(file: Path, raw: IO[bytes], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Where the numbers begin, once the header says nothing but what it should."""
    size = int.from_bytes(raw.read(8), "little")
    if size > LARGEST_HEADER:
        raise SnapshotError(file, f"its header is larger than {LARGEST_HEADER:,} bytes")
    count = torch.Size(shape).numel() * dtype.itemsize
    wanted = {"dtype": TYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [0, count]}
    try:
        header: Any = json.loads(raw.read(size))
    except (ValueError, RecursionError) as error:
        raise SnapshotError(file, f"unreadable: {str(error)[:200]}") from None
    if not isinstance(header, dict) or list(header) != [name]:
        raise SnapshotError(file, f"should hold the one tensor {name!r}")
    if header[name] != wanted:
        kinds = " ".join(str(header[name]).split())[:200]
        raise SnapshotError(file, f"holds {kinds}, expected {wanted['dtype']} {list(shape)}")
    return 8 + size
