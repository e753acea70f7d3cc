"""Rows that lie in a file of a local disk instead of in memory, for tables that are larger than it.

The system keeps the pages that are used in memory, and writes others back to the file when it needs the room.
A step is as fast as in memory as long as the rows that it asks for are there. Of one that is not, the page is
read that it lies on, and no more: rows are asked for in no order.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakSet

import torch
from torch import Tensor

from embeddings.disk import free_disk
from embeddings.errors import ConfigError

_IN_USE: WeakSet[mmap.mmap] = WeakSet()


def mapped_rows(folder: Path, count: int, dtype: torch.dtype) -> Tensor:
    """Zeros of a type, in a file that has no name and goes with the process.

    Raises:
        ConfigError: the folder cannot be written, or its disk has no room for them.
    """
    size = count * dtype.itemsize
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            # All of it now: a page for which the disk has no room later would kill the process.
            os.posix_fallocate(file.fileno(), 0, size)
            memory = mmap.mmap(file.fileno(), size)
            memory.madvise(mmap.MADV_RANDOM)
    except OSError as error:
        room = free_disk(folder) if folder.is_dir() else None
        free = "" if room is None else f" ({room / 1e9:,.1f} GB are free)"
        problem = f"{size / 1e9:,.1f} GB of tables cannot lie there: {error.strerror}{free}"
        raise ConfigError(f"plan.mapped_folder = {str(folder)!r}: {problem}") from None
    _IN_USE.add(memory)
    return torch.frombuffer(memory, dtype=dtype)


@contextmanager
def read_in_order() -> Iterator[None]:
    """Have the system read ahead of mapped rows, for what reads them from first to last, as a save does."""
    for memory in list(_IN_USE):
        memory.madvise(mmap.MADV_NORMAL)
    try:
        yield
    finally:
        for memory in list(_IN_USE):
            memory.madvise(mmap.MADV_RANDOM)
