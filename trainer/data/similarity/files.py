"""Vectors in Parquet become directions of ids of the log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.errors import DataError, UnavailableError
from trainer.config.similarity import VectorsConfig
from trainer.data.similarity.directions import MOST_DIM, Directions, directions_of
from trainer.data.similarity.keys import Ints, Key, Translation
from trainer.data.similarity.vectors import Vectors
from trainer.log.arrow import PARQUET_ERRORS, is_list
from trainer.log.vocabulary import batches_of
from trainer.storage import is_remote
from trainer.storage.ranges import parquet_source

_Numbers = npt.NDArray[np.floating]
# (row among those that are looked at, problem) -> the error.
_Fail = Callable[[int, str], DataError]


@dataclass(frozen=True)
class VectorCounts:
    """What was found in the files of some vectors.

    Attributes:
        used: ids that have a vector; of: ids that the log has, 0 where nobody knows.
        unknown: rows of ids that the log does not have; zero: vectors of zeros; null: rows without an id or
            without a vector; repeated: rows that say again what another row said.
    """

    used: int = 0
    of: int = 0
    unknown: int = 0
    zero: int = 0
    null: int = 0
    repeated: int = 0

    def entry(self) -> dict[str, int]:
        """For summary.json."""
        return asdict(self)

    def line(self, file: Path, key: str) -> str:
        """All of it, in one sentence."""
        of = f" of {self.of:,}" if self.of else ""
        what = f"{self.used:,}{of} ids of {key} in the log have a vector"
        if not self.of:
            what = f"vectors of {self.used:,} ids of {key}"
        more = {
            "row(s) of ids that the log does not have": self.unknown,
            "vector(s) of zeros, which count as missing": self.zero,
            "row(s) without an id or a vector": self.null,
            "row(s) that repeat another one": self.repeated,
        }
        told = [f"{count:,} {words}" for words, count in more.items() if count]
        return f"{file}: {what}" + (f"; {', '.join(told)}" if told else "")


def read_vectors(settings: VectorsConfig, key: Key, log: Path) -> tuple[Vectors, VectorCounts]:
    """The vectors of all ids of a log, and of raw ids all that there are.

    Raises:
        DataError: a file is missing, damaged or has other columns, a vector has another width than the ones
            before or holds NaN or infinity, an id has two different vectors, or no id has one.
        UnavailableError: a store cannot be read now.
    """
    ids, blocks, counts, dim = list[Ints](), list[Directions](), VectorCounts(of=key.counted), 0
    for file in files_of(settings.file):
        for part in _read_file(file, settings, key, log, dim):
            dim, counts = part.dim, _added(counts, part.counts)
            ids.append(part.ids)
            blocks.append(part.directions)
    if not ids:
        raise DataError("has no row", file=settings.file)
    found, repeated = _in_order(np.concatenate(ids), np.concatenate(blocks), settings)
    counts = replace(counts, used=found.ids.size, repeated=repeated)
    if not found.ids.size:
        problem = f"says nothing of this log ({counts.line(settings.file, key.name)})"
        raise DataError(f"{problem}; are these the ids of {key.name}?", file=settings.file)
    return found, counts


@dataclass(frozen=True)
class _Part:
    """Some rows: ids and directions of those that are used, the width of all, and counts of the others."""

    ids: Ints
    directions: Directions
    dim: int
    counts: VectorCounts


def _added(left: VectorCounts, right: VectorCounts) -> VectorCounts:
    zero, null = left.zero + right.zero, left.null + right.null
    return replace(left, unknown=left.unknown + right.unknown, zero=zero, null=null)


def files_of(place: Path) -> Sequence[Path]:
    """The Parquet files of a place: itself, or those of a folder."""
    if not place.is_dir():
        return [place]
    found = sorted(path for path in place.iterdir() if path.name.endswith(".parquet"))
    if not found:
        raise DataError("is a folder without *.parquet files", file=place)
    return found


def _read_file(file: Path, settings: VectorsConfig, key: Key, log: Path, dim: int) -> Iterator[_Part]:
    """A part for each piece of a file; `dim`: the width so far, 0 = none yet."""
    names = settings.ids, settings.vector_column
    try:
        with pq.ParquetFile(parquet_source(file), page_checksum_verification=True) as parquet:
            schema = parquet.schema_arrow
            for name in names:
                if name not in schema.names:
                    problem = f"no such column; the file has {', '.join(schema.names)}"
                    raise DataError(problem, file=file, column=name)
            _check_type(file, settings.vector_column, schema.field(settings.vector_column).type)
            kind = schema.field(settings.ids).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            translation = key.translation(log, kind, file, settings.ids)
            first = 0
            for batch in batches_of(parquet, names):
                part = _read_rows(batch, settings, translation, dim, (file, first))
                dim, first = part.dim, first + batch.num_rows
                yield part
    except FileNotFoundError:
        raise DataError("no such file; see [data.vectors] of the config", file=file) from None
    except PARQUET_ERRORS as error:
        if is_remote(file) and isinstance(error, OSError) and error.errno is not None:
            raise UnavailableError(file, f"cannot be read: {error.strerror or error}") from error
        raise DataError(f"unreadable: {error}", file=file) from error


def _check_type(file: Path, column: str, kind: pa.DataType) -> None:
    numbers = is_list(kind) and (
        pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)
    )
    if not numbers:
        raise DataError(f"holds {kind}; a vector is a list of numbers", file=file, column=column)


def _read_rows(
    batch: pa.RecordBatch, settings: VectorsConfig, translation: Translation, dim: int, at: tuple[Path, int]
) -> _Part:
    """`at`: the file, and the number of the first row in it."""
    raw, lists = batch.column(settings.ids), batch.column(settings.vector_column)
    there = raw.is_valid().to_numpy(zero_copy_only=False) & lists.is_valid().to_numpy(zero_copy_only=False)
    rows = np.flatnonzero(there)
    raw, lists = raw.take(pa.array(rows)), lists.take(pa.array(rows))
    if pa.types.is_dictionary(raw.type):
        raw = raw.cast(raw.type.value_type)

    def fail(row: int, problem: str) -> DataError:
        return DataError(problem, file=at[0], column=settings.vector_column, row=at[1] + int(rows[row]))

    values, dim = _matrix(lists, dim, fail)
    if (bad := np.flatnonzero(~np.isfinite(values).all(axis=1))).size:
        raise fail(bad[0], "holds null, NaN or infinity; leave the row out, or mend the vector")
    ids, known = translation(raw)
    directions = directions_of(values[known])
    given = directions.any(axis=1)
    unknown, zero = int((~known).sum()), int((~given).sum())
    counts = VectorCounts(unknown=unknown, zero=zero, null=int((~there).sum()))
    return _Part(ids[known][given], directions[given], dim, counts)


def _matrix(lists: pa.Array, dim: int, fail: _Fail) -> tuple[_Numbers, int]:
    """Lists without nulls as [n, dim], NaN for nulls in them, and their width."""
    kind = lists.type
    lists = lists.cast(pa.large_list(pa.field("item", kind.value_type)))
    lengths = np.diff(lists.offsets.to_numpy())
    if lengths.size and not dim:
        dim = int(lengths[0])
        if not 1 <= dim <= MOST_DIM:
            raise fail(0, f"has {dim:,} numbers; a vector has 1 to {MOST_DIM:,}")
    if (other := np.flatnonzero(lengths != dim)).size:
        raise fail(other[0], f"has {lengths[other[0]]:,} numbers, and the vectors before have {dim:,}")
    values = lists.flatten()
    narrow = kind.value_type in (pa.float16(), pa.float32())
    return values.cast(pa.float32() if narrow else pa.float64()).to_numpy(zero_copy_only=False).reshape(
        lengths.size, dim
    ), dim


def _in_order(ids: Ints, directions: Directions, settings: VectorsConfig) -> tuple[Vectors, int]:
    """Ids ascending, each once, and how many rows said the same again.

    Raises:
        DataError: an id has two different vectors.
    """
    order = np.argsort(ids, kind="stable")
    if not (ids[1:] > ids[:-1]).all():
        ids, directions = ids[order], directions[order]
    again = np.flatnonzero(ids[1:] == ids[:-1])
    for some in np.array_split(again, 1 + again.size // 65_536):
        if (other := (directions[some] != directions[some + 1]).any(axis=1)).any():
            at = ids[some[other][0]]
            problem = f"two different vectors of one id (the log's {at}); keep one of them"
            raise DataError(problem, file=settings.file, column=settings.ids)
    if again.size:
        ids, directions = np.delete(ids, again), np.delete(directions, again, axis=0)
    return Vectors(ids, directions), int(again.size)
