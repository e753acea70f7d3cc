"""Rows of numbers in the order of a key, however many: in memory, or in files that are mapped.

A million rows are sorted in memory. Of more, sorted runs are written, and merged one range of keys after
another, so that memory holds about one run whatever the number of rows. The result is then looked up where it
lies: a binary search in a mapped file reads the pages that it touches.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.storage.local import naming

Array = npt.NDArray[Any]
Rows = Mapping[str, Array]
KEY = "key"
# Rows of a run, and of what is merged at a time.
_RUN = 1 << 20
# One key of a run in so many is remembered, to know where a range of keys begins.
_EVERY = 1 << 10


def sort_rows(
    parts: Iterable[Rows],
    types: Mapping[str, npt.DTypeLike],
    room: Callable[[], Path],
    choose: Callable[[Rows], Rows] = lambda rows: rows,
) -> Rows:
    """All rows by `key`, ascending; rows with the same key stay in their order.

    Args:
        parts: columns of equal length, one of them `key`; types: column -> number type.
        room: gives a local folder, where the rows are many, for files called like the columns. Once they are
            mapped they may be deleted: what is deleted and mapped stays until nobody uses it.
        choose: takes sorted rows, with all of the same key together, and gives those that are wanted.

    Raises:
        OSError: the folder cannot be written.
    """
    runs: list[_Run] = []
    waiting: list[Rows] = []
    count = 0
    for part in parts:
        waiting.append(part)
        count += part[KEY].size
        if count >= _RUN:
            folder = runs[0].folder if runs else room()
            runs.append(_Run(_sorted(waiting, types), folder, len(runs)))
            waiting, count = [], 0
    if not runs:
        return choose(_sorted(waiting, types))
    folder = runs[0].folder
    if waiting:
        runs.append(_Run(_sorted(waiting, types), folder, len(runs)))
    with ExitStack() as opened:
        files = {name: opened.enter_context((folder / name).open("wb")) for name in types}
        for rows in _merged(runs, types):
            for name, values in choose(rows).items():
                append(files[name], values)
    for run in runs:
        run.remove()
    return {name: mapped(folder / name, of_type) for name, of_type in types.items()}


def append(file: Any, values: Array) -> None:
    """Write an array at the end of a file; an error says which."""
    with naming(file.name):
        file.write(np.ascontiguousarray(values).data.cast("B") if values.size else b"")


def mapped(file: Path, of_type: npt.DTypeLike) -> Array:
    """The numbers of a file, memory-mapped and read-only, for looks here and there."""
    with file.open("rb") as raw:
        if not os.fstat(raw.fileno()).st_size:
            return np.zeros(0, of_type)
        pages = mmap.mmap(raw.fileno(), 0, prot=mmap.PROT_READ)
    return np.frombuffer(pages, of_type)


class _Run:
    """Sorted rows in files, read from front to back."""

    def __init__(self, rows: Rows, folder: Path, number: int) -> None:
        self.folder = folder
        self._files = {name: folder / f"{name}.{number}" for name in rows}
        self._types = {name: values.dtype for name, values in rows.items()}
        for name, values in rows.items():
            with self._files[name].open("wb") as file:
                append(file, values)
        self.some_keys = rows[KEY][::_EVERY].copy()
        self._at, self._size = 0, rows[KEY].size

    def take(self, end: Any) -> Rows:
        """The next rows, those whose key is below `end`; None: all that are left."""
        count = self._size - self._at
        if end is not None:
            # The first key that is not below it lies no farther than the first such key of those remembered.
            stop = min(int(np.searchsorted(self.some_keys, end)) * _EVERY, self._size)
            count = int(np.searchsorted(self._read(KEY, max(stop - self._at, 0)), end))
        rows = {name: self._read(name, count) for name in self._files}
        self._at += count
        return rows

    def _read(self, name: str, count: int) -> Array:
        of_type = self._types[name]
        return np.fromfile(self._files[name], of_type, count, offset=self._at * of_type.itemsize)

    def remove(self) -> None:
        for file in self._files.values():
            file.unlink()


def _merged(runs: Sequence[_Run], types: Mapping[str, npt.DTypeLike]) -> Iterator[Rows]:
    """The rows of all runs, about as many at a time as a run has; rows of one key come together."""
    some = np.sort(np.concatenate([run.some_keys for run in runs]))
    each = max(_RUN // _EVERY, 1)
    for end in [*np.unique(some[each::each]), None]:
        yield _sorted([run.take(end) for run in runs], types)


def _sorted(parts: Sequence[Rows], types: Mapping[str, npt.DTypeLike]) -> Rows:
    rows = {
        name: np.concatenate([np.zeros(0, of_type), *(np.asarray(part[name], of_type) for part in parts)])
        for name, of_type in types.items()
    }
    order = np.argsort(rows[KEY], kind="stable")
    return {name: values[order] for name, values in rows.items()}
