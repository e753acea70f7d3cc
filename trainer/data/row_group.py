"""One row group of a sequence log as flat numpy arrays, and the checks that need no other column.

`trainer.data.rows` puts the columns together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.errors import DataError
from trainer.log.arrow import PARQUET_ERRORS
from trainer.log.bags import Bags, Ids, Ints
from trainer.log.schema import FeatureInfo
from trainer.storage import is_remote
from trainer.storage.ranges import columns_of, footer_of

# A list offset or count beyond this is damage, not data; it bounds what a bad file can make us allocate.
LONGEST = 1 << 31

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FeatureIds(Mapping[str, Bags]):
    """Feature -> ids of n behaviors, candidates or requests. Ids are int32 if all tables are small enough.

    Attributes:
        single: names of the features with one id each; ids: [single, n], one row each, so that a stretch of
            all of them is one slice.
        multi: the other features, and numbers, whose codes are int64.
    """

    single: Sequence[str]
    ids: Ids
    multi: Mapping[str, Bags]

    def __getitem__(self, name: str) -> Bags:
        if name not in self.single:
            return self.multi[name]
        return Bags(self.ids[self.single.index(name)])

    def __iter__(self) -> Iterator[str]:
        return iter([*self.single, *self.multi])

    def __len__(self) -> int:
        return len(self.single) + len(self.multi)


class GroupColumns:
    """One row group being decoded; knows its place for the errors."""

    def __init__(self, file: Path, row_group: int, table: pa.Table) -> None:
        self.file, self.row_group, self.table = file, row_group, table

    def fail(self, problem: str, column: str, row: int | None = None) -> DataError:
        return DataError(problem, file=self.file, row_group=self.row_group, column=column, row=row)

    def column(self, name: str) -> pa.Array:
        column = self.table.column(name)
        if column.null_count:
            raise self.fail("holds nulls; write the log again with `tandemrec ingest`", name)
        # combine_chunks copies even a single chunk, which is what a row group has.
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    def ints(self, name: str) -> Ints:
        return self.flat(self.column(name), name, np.int64)

    def flat(self, values: pa.Array, name: str, dtype: type) -> npt.NDArray:  # type: ignore[type-arg]
        if values.null_count:
            raise self.fail("holds nulls inside its lists", name)
        return self._numbers(values, name, dtype)

    def labels(self, values: pa.Array, name: str, partial: bool) -> Floats:
        """Labels as float32; where a partial one was not observed, it is null or NaN, and NaN here."""
        labels: Floats = self._numbers(values, name, np.float32)
        if not partial and np.isnan(labels).any():
            raise self.fail(
                "holds nulls or NaN, and the log's manifest does not say that the label is partial; ingest "
                "the events again with `partial = true` for it, if only a part of the candidates has it",
                name,
            )
        return labels

    def _numbers(self, values: pa.Array, name: str, dtype: type) -> npt.NDArray:  # type: ignore[type-arg]
        kind = values.type
        exact = pa.types.is_signed_integer(kind) or kind in (pa.uint8(), pa.uint16(), pa.uint32())
        if not (exact or (dtype is np.float32 and pa.types.is_floating(kind))):
            raise self.fail(
                f"has type {kind}, expected {'a number' if dtype is np.float32 else 'int64'}", name
            )
        return np.ascontiguousarray(values.to_numpy(zero_copy_only=False), dtype=dtype)

    def lists(self, name: str) -> tuple[Ints, pa.Array]:
        """Offsets from zero, and the flattened items of a list column."""
        return self.unnest(self.column(name), name)

    def unnest(self, column: pa.Array, name: str) -> tuple[Ints, pa.Array]:
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            raise self.fail(f"has type {column.type}, a list is needed", name)
        if column.null_count:
            raise self.fail("holds nulls inside its lists", name)
        offsets = column.offsets.to_numpy().astype(np.int64)
        if offsets.size == 0:
            offsets = np.zeros(1, dtype=np.int64)
        begin, count = int(offsets[0]), int(offsets[-1]) - int(offsets[0])
        if (offsets[1:] < offsets[:-1]).any() or count > LONGEST or begin + count > len(column.values):
            raise self.fail("has impossible list lengths", name)
        return offsets - begin, column.values.slice(begin, count)

    def same_lengths(self, expected: Ints, actual: Ints, name: str, other: str) -> None:
        if not np.array_equal(expected, actual):
            row = None
            if expected.size == actual.size:
                row = int(np.nonzero(np.diff(expected) != np.diff(actual))[0][0])
            raise self.fail(f"its lists differ in length from those of {other}", name, row)

    def features(
        self, side: str, infos: Mapping[str, FeatureInfo], owners: Ints, items: Callable[[str], pa.Array]
    ) -> FeatureIds:
        """Features of one side, checked against their tables; `items` flattens a column of n bags.

        `owners` delimits the bags of each row (or request) for the error.
        """
        # Windows of row groups are kept in memory, and most of what they hold is ids.
        small = all(info.bound <= 1 << 31 for info in infos.values() if info.encoder is None)
        kind = np.dtype(np.int32 if small else np.int64)
        single = [name for name, info in infos.items() if not info.multi and info.encoder is None]
        ids = np.empty((len(single), int(owners[-1])), dtype=kind)
        multi = {}
        for name, info in infos.items():
            column = f"{side}_{name}"
            values = items(column)
            if info.multi:
                offsets, values = self.unnest(values, column)
                checked = self.ids(values, column, info.bound, offsets[owners])
                multi[name] = Bags(checked.astype(kind), offsets)
            elif info.encoder is not None:
                multi[name] = Bags(self.flat(values, column, np.int64))
            else:
                ids[single.index(name)] = self.ids(values, column, info.bound, owners)
        return FeatureIds(single, ids, multi)

    def ids(self, values: pa.Array, name: str, rows: int, owners: Ints) -> Ints:
        ids: Ints = self.flat(values, name, np.int64)
        # As unsigned numbers negative ids are the largest, so that one pass finds both.
        if ids.size and ids.view(np.uint64).max() >= rows:
            at = int(np.nonzero((ids < 0) | (ids >= rows))[0][0])
            row = int(np.searchsorted(owners, at, side="right")) - 1
            raise self.fail(f"id {ids[at]} lies outside the table of {rows} rows", name, row)
        return ids


def read_footer(file: Path) -> pq.FileMetaData:
    """Where a file's row groups and columns lie; parsing it is a good part of reading a small row group.

    Raises:
        DataError: missing or unreadable file.
    """
    with _plain_errors(file):
        if is_remote(file):
            return footer_of(file)
        with pq.ParquetFile(file) as parquet:
            return parquet.metadata


def read_group(
    file: Path, row_group: int, names: Sequence[str], footer: pq.FileMetaData | None
) -> GroupColumns:
    """The named columns of a row group, undecoded.

    Raises:
        DataError: missing or unreadable file, missing column.
    """
    with (
        _plain_errors(file, row_group),
        columns_of(file, row_group, names, footer) as (source, known),
        pq.ParquetFile(source, metadata=known, page_checksum_verification=True) as parquet,
    ):
        table = parquet.read_row_group(row_group, columns=list(names), use_threads=False)
        missing = sorted(set(names) - set(table.column_names))
    if missing:
        raise DataError("no such column in the file", file=file, column=missing[0])
    return GroupColumns(file, row_group, table)


@contextmanager
def _plain_errors(file: Path, row_group: int | None = None) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError("no such file; ingest the log again", file=file) from None
    except PARQUET_ERRORS as error:
        raise DataError(f"unreadable: {error}", file=file, row_group=row_group) from None
