"""A vocabulary file, `vocab/<feature>.parquet`: which raw value each dense id stands for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embeddings.errors import DataError, UnavailableError
from trainer.log.arrow import PARQUET_ERRORS
from trainer.storage import is_remote
from trainer.storage.ranges import parquet_source

_ROWS_AT_ONCE = 1 << 16


def spell(values: pa.Array) -> memoryview:
    """What the digest of a vocabulary is of: each value as text in UTF-8, with a line end behind it."""
    empty, end = pa.scalar("", pa.large_string()), pa.scalar("\n", pa.large_string())
    nulls = {"null_handling": "replace", "null_replacement": "None"}
    lines = pc.binary_join_element_wise(values.cast(pa.large_string()), empty, end, **nulls)
    return text_of(lines)[1]


def text_of(values: pa.Array) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], memoryview]:
    """Where each text of a large_string array begins and ends, from zero, and all bytes."""
    _, offsets, data = values.buffers()
    bounds = np.frombuffer(offsets, dtype=np.int64)[values.offset : values.offset + len(values) + 1]
    first, last = int(bounds[0]), int(bounds[-1])
    return bounds - first, memoryview(b"" if data is None else data)[first:last]


def batches_of(parquet: pq.ParquetFile, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a file of any size, piece by piece."""
    for group in range(parquet.num_row_groups):
        # An iterator over all row groups keeps the bytes of those that it has left behind.
        yield from parquet.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=list(names))


def read_values(file: Path, digest: str, *, of_log: bool = False) -> pa.Array:
    """All values of a vocabulary in one array; see `stream_values`."""
    return pa.concat_arrays(stream_values(file, digest, of_log=of_log))


def stream_values(file: Path, digest: str, *, of_log: bool = False) -> Iterator[pa.Array]:
    """The values of a vocabulary in the order of their ids, in pieces of int64 or large_string; one at least.

    Only when the last piece was taken is it sure that the digest is right.

    Args:
        digest: SHA-256 of the values, as a log's manifest has it.
        of_log: the digest is of the log that the file lies in, not of a model, for messages.

    Raises:
        DataError: the file is missing or damaged, or holds another vocabulary.
        UnavailableError: its store cannot be read now.
    """
    remedy = "take another copy of that log" if of_log else "take the one of the model's log"
    content, first = hashlib.sha256(), 1
    try:
        with pq.ParquetFile(parquet_source(file), page_checksum_verification=True) as parquet:
            names = parquet.schema_arrow.names
            if "value" not in names or "id" not in names:
                problem = f"has the columns {', '.join(names)}, not value and id; {remedy}"
                raise DataError(problem, file=file)
            integers = pa.types.is_integer(parquet.schema_arrow.field("value").type)
            kind = pa.int64() if integers else pa.large_string()
            yield pa.array([], kind)
            for batch in batches_of(parquet, ["value", "id"]):
                ids = batch.column("id").to_numpy(zero_copy_only=False)
                if not np.array_equal(ids, np.arange(first, first + ids.size)):
                    problem = f"its ids do not count from 1, as `tandemrec ingest` writes them; {remedy}"
                    raise DataError(problem, file=file)
                first += ids.size
                values = batch.column("value").cast(kind)
                content.update(spell(values))
                yield values
    except FileNotFoundError:
        problem = f"missing, so nobody can tell what the ids stand for; {remedy}"
        raise DataError(problem, file=file) from None
    except PARQUET_ERRORS as error:
        if is_remote(file) and isinstance(error, OSError) and error.errno is not None:
            raise UnavailableError(file, f"cannot be read: {error.strerror or error}") from error
        raise DataError(f"unreadable: {error}; {remedy}", file=file) from error
    if content.hexdigest() != digest:
        problem = "is not the vocabulary that the model was trained with"
        if of_log:
            problem = "is not the vocabulary in the log's manifest, so it was damaged or replaced"
        raise DataError(f"{problem}; {remedy}", file=file)
