"""Rows of candidates that are more than memory holds: written as sorted runs, read in order.

A row is a candidate, known by `user_id`, `request_id` and `candidate`, with whatever other columns there are.
Runs are Parquet files, and their footers say which users each row group has. So files are merged by reading,
for one range of users after another, the row groups that may hold them: once over each file where users lie
together, as in a log, and correctly wherever they lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.row_group import read_footer, read_group
from trainer.sealed_folder import naming
from trainer.storage.objects import writing
from trainer.storage.places import is_remote

Columns = Mapping[str, npt.NDArray[Any]]
ORDER = ("user_id", "request_id", "candidate")
# Rows of a run, of one of its row groups, and of a piece that is read back (and one user more).
_RUN, _GROUP, _PIECE = 1 << 20, 1 << 16, 1 << 20


class Runs:
    """Takes rows in any order, and writes them as sorted runs.

    Args:
        folder: where the runs are written; name: what their names begin with, one for each writer.
        size: rows of a run, 0 = a million.
    """

    def __init__(self, folder: Path, name: str, size: int = 0) -> None:
        self._folder, self._name, self._size = folder, name, size or _RUN
        self._waiting: list[Columns] = []
        self._rows = 0
        self.files: list[Path] = []

    def add(self, columns: Columns) -> None:
        self._waiting.append(columns)
        self._rows += columns["user_id"].size
        if self._rows >= self._size:
            self.flush()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            OSError: it cannot be written.
        """
        if not self._rows:
            return
        rows = joined(self._waiting)
        self._waiting, self._rows = [], 0
        file = self._folder / f"{self._name}-{len(self.files):05d}.parquet"
        with naming(file):
            table = pa.table(dict(in_order(rows)))
            with writing(file) if is_remote(file) else file.open("wb") as part:
                pq.write_table(table, part, row_group_size=_GROUP, compression="lz4", use_dictionary=False)
        self.files.append(file)


def joined(parts: Sequence[Columns]) -> Columns:
    """The rows of all parts, one after another."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def in_order(rows: Columns) -> Columns:
    """The same rows by user, request and candidate."""
    user, request, candidate = (rows[name] for name in ORDER)
    same_user, same_request = user[1:] == user[:-1], request[1:] == request[:-1]
    later = (request[1:] > request[:-1]) | (same_request & (candidate[1:] >= candidate[:-1]))
    if ((user[1:] > user[:-1]) | (same_user & later)).all():
        return rows
    order = np.lexsort((candidate, request, user))
    return {name: values[order] for name, values in rows.items()}


class RowFile:
    """Rows of some numbers, one after another in a file that is open only while it is written or read.

    So there may be any number of such files. The file is there once it has rows.

    Args:
        of_row: the number types of a row.

    Attributes:
        rows: how many are written.
    """

    def __init__(self, path: Path, of_row: np.dtype[Any]) -> None:
        self._path, self.of_row = path, of_row
        self._lengths: list[int] = []
        self.rows = 0

    def write(self, rows: npt.NDArray[Any]) -> None:
        """Raises OSError where the disk is full."""
        with naming(self._path), self._path.open("ab") as file:
            file.write(rows.tobytes())
        self._lengths.append(rows.size)
        self.rows += rows.size

    def written(self) -> Iterator[npt.NDArray[Any]]:
        """The rows as they were written, piece by piece."""
        yield from self._read(self._lengths)

    def pieces(self, size: int) -> Iterator[npt.NDArray[Any]]:
        """The rows, so many at a time."""
        yield from self._read([size] * -(-self.rows // size))

    def _read(self, lengths: Sequence[int]) -> Iterator[npt.NDArray[Any]]:
        if self.rows:
            with self._path.open("rb") as file:
                for length in lengths:
                    yield np.frombuffer(file.read(length * self.of_row.itemsize), dtype=self.of_row)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


class _Piece(NamedTuple):
    """A row group of a file, and its first and last user."""

    file: int
    row_group: int
    rows: int
    first: int
    last: int


class Merged:
    """The rows of some Parquet files by user, request and candidate, a piece of whole users at a time.

    Args:
        files: sorted or not, all with the same columns; size: rows of a piece, about, 0 = a million.

    Raises:
        DataError: a file is missing or malformed.
    """

    def __init__(self, files: Sequence[Path], size: int = 0) -> None:
        self.files, self._size = list(files), size or _PIECE
        self._footers = [read_footer(file) for file in self.files]
        self._pieces = [
            _piece(file, number, footer.row_group(number))
            for file, footer in enumerate(self._footers)
            for number in range(footer.num_row_groups)
        ]
        self.rows = sum(piece.rows for piece in self._pieces)

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        return list(self._footers[0].schema.to_arrow_schema().names) if self._footers else []

    def __call__(self, names: Sequence[str] | None = None) -> Iterator[Columns]:
        """Pieces in ascending order of users, each with all rows of its users.

        Args:
            names: columns besides those of `ORDER`; None = all.
        """
        wanted = self.names if names is None else list(dict.fromkeys([*ORDER, *names]))
        before = None
        waiting = sorted(self._pieces, key=lambda piece: piece.first)
        for last in self._ends():
            here, rest = [], []
            for number, piece in enumerate(waiting):
                if piece.first > last:
                    rest += waiting[number:]
                    break
                here.append(piece)
                if piece.last > last:
                    rest.append(piece)
            waiting = rest
            parts = [self._read(piece, wanted, before, last) for piece in here]
            yield in_order(joined(parts))
            before = last

    def _ends(self) -> Iterator[int]:
        """The last user of each piece that is read."""
        ends: dict[int, int] = {}
        for piece in self._pieces:
            ends[piece.last] = ends.get(piece.last, 0) + piece.rows
        rows = 0
        for last, count in sorted(ends.items()):
            rows += count
            if rows >= self._size:
                yield last
                rows = 0
        if rows:
            yield last

    def _read(self, piece: _Piece, names: Sequence[str], before: int | None, last: int) -> Columns:
        """The rows of a row group whose users come after `before`, up to `last`."""
        file, footer = self.files[piece.file], self._footers[piece.file]
        table = read_group(file, piece.row_group, names, footer).table
        rows = {name: table.column(name).to_numpy() for name in names}
        if piece.last <= last and (before is None or piece.first > before):
            return rows
        user = rows["user_id"]
        kept = user <= last
        if before is not None:
            kept &= user > before
        return {name: values[kept] for name, values in rows.items()}


def _piece(file: int, number: int, group: pq.RowGroupMetaData) -> _Piece:
    least, most = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    for column in map(group.column, range(group.num_columns)):
        if column.path_in_schema == "user_id" and column.is_stats_set and column.statistics.has_min_max:
            least, most = column.statistics.min, column.statistics.max
    return _Piece(file, number, group.num_rows, int(least), int(most))
