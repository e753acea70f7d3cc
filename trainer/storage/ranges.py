"""Parquet files in a store: read by ranges, the columns of a row group in few requests at once."""

from __future__ import annotations

import errno
import io
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.utils import merge_offset_ranges

from trainer.storage.objects import in_parallel, read_range
from trainer.storage.places import is_remote, store_of

# Bytes at the end of a file that are fetched for its footer; a larger footer takes a second request.
_TAIL = 1 << 16
# Ranges nearer to each other than this are fetched together, up to so many bytes at once.
_GAP, _MOST = 1 << 17, 1 << 24


def footer_of(file: Path) -> pq.FileMetaData:
    """The footer of a file in a store, in one request.

    Raises:
        OSError, pyarrow.ArrowInvalid: it is missing, cannot be read, or is no Parquet file.
    """
    store, path = store_of(file)
    tail = store.cat_file(path, start=-_TAIL)
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] == b"PAR1" and len(tail) == _TAIL < length:
        tail = store.cat_file(path, start=-length)
    return pq.read_metadata(pa.BufferReader(tail))


@contextmanager
def columns_of(
    file: Path, row_group: int, names: Collection[str], footer: pq.FileMetaData | None
) -> Iterator[tuple[Any, pq.FileMetaData | None]]:
    """What pyarrow reads the named columns of a row group from, and the footer.

    A local file is read as ever; of a remote one these columns are fetched, and nothing else.
    """
    if not is_remote(file):
        yield file, footer
        return
    footer = footer or footer_of(file)
    group = footer.row_group(row_group)
    wanted: list[tuple[int, int]] = []
    for number in range(group.num_columns):
        column = group.column(number)
        if column.path_in_schema.partition(".")[0] in names:
            begin = column.dictionary_page_offset or column.data_page_offset
            begin = min(begin, column.data_page_offset)
            wanted.append((begin, begin + column.total_compressed_size))
    yield _Fetched(file, wanted), footer


class _Fetched(io.RawIOBase):
    """Some ranges of a file, as a file."""

    def __init__(self, file: Path, wanted: list[tuple[int, int]]) -> None:
        starts, ends = [start for start, _ in wanted], [end for _, end in wanted]
        _, starts, ends = merge_offset_ranges([str(file)] * len(wanted), starts, ends, _GAP, _MOST)
        pieces = in_parallel(lambda each: read_range(file, *each), zip(starts, ends, strict=True))
        self._pieces: list[tuple[int, bytes]] = list(zip(starts, pieces, strict=True))
        self._size, self._at = max(ends, default=0) + _TAIL, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            for start, piece in self._pieces:
                if start <= self._at < start + len(piece):
                    part = piece[self._at - start : self._at - start + len(view) - done]
                    view[done : done + len(part)] = part
                    done, self._at = done + len(part), self._at + len(part)
                    break
            else:
                raise OSError(errno.EIO, f"byte {self._at} was not fetched")
        return done


def parquet_source(file: Path) -> Any:
    """What pyarrow reads a small file as a whole from: its path, or the content of an object, by pieces."""
    if not is_remote(file):
        return file
    store, path = store_of(file)
    return store.open(path, "rb", block_size=_MOST, cache_type="readahead")
