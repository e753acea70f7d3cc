"""Decoding one row group of a sequence log into flat numpy arrays, with every check a bad log can fail.

Ids are checked here, because a sharded table silently maps a bad id to row 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.errors import DataError

# What pyarrow raises on a damaged file; a name that is no UTF-8 any more surfaces as a ValueError.
PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Columns:
    """Which columns are read: features with their table rows, and the label of every task."""

    rows: Mapping[str, int]
    tasks: Sequence[str]

    def names(self) -> list[str]:
        names = ["user_id", "history_timestamp", "request_id", "request_timestamp", "request_history_end"]
        for feature in self.rows:
            names += [f"history_{feature}", f"candidate_{feature}"]
        return names + [f"label_{task}" for task in self.tasks]


@dataclass(frozen=True)
class UserRows:
    """The rows of one row group, flattened. Offsets have one entry more than what they delimit.

    Attributes:
        user_id: [U].
        history_offsets: [U + 1] into the behaviors; request_offsets: [U + 1] into the requests.
        history: feature -> [behaviors]; history_time: [behaviors].
        request_id, request_time, history_end: [requests]; history_end counts from the row's first behavior.
        candidate_offsets: [requests + 1] into the candidates.
        candidates: feature -> [candidates]; labels: [candidates, tasks].
    """

    user_id: Ints
    history_offsets: Ints
    request_offsets: Ints
    history: Mapping[str, Ints]
    history_time: Ints
    request_id: Ints
    request_time: Ints
    history_end: Ints
    candidate_offsets: Ints
    candidates: Mapping[str, Ints]
    labels: Floats


class _Group:
    """One row group being decoded; knows its place for the errors."""

    def __init__(self, file: Path, row_group: int, table: pa.Table) -> None:
        self.file, self.row_group, self.table = file, row_group, table

    def fail(self, problem: str, column: str, row: int | None = None) -> DataError:
        return DataError(problem, file=self.file, row_group=self.row_group, column=column, row=row)

    def column(self, name: str) -> pa.Array:
        column = self.table.column(name).combine_chunks()
        if column.null_count:
            raise self.fail("holds nulls; write the log again with `tandemrec ingest`", name)
        return column

    def ints(self, name: str) -> Ints:
        return self.flat(self.column(name), name, np.int64)

    def flat(self, values: pa.Array, name: str, dtype: type) -> npt.NDArray:  # type: ignore[type-arg]
        if values.null_count:
            raise self.fail("holds nulls inside its lists", name)
        kind = values.type
        exact = pa.types.is_signed_integer(kind) or kind in (pa.uint8(), pa.uint16(), pa.uint32())
        if not (exact or (dtype is np.float32 and pa.types.is_floating(kind))):
            raise self.fail(
                f"has type {kind}, expected {'a number' if dtype is np.float32 else 'int64'}", name
            )
        return np.ascontiguousarray(values.to_numpy(zero_copy_only=False), dtype=dtype)

    def lists(self, name: str) -> tuple[Ints, pa.Array]:
        """Offsets from zero, and the flattened items of a list column."""
        column = self.column(name)
        return self.unnest(column, name)

    def unnest(self, column: pa.Array, name: str) -> tuple[Ints, pa.Array]:
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            raise self.fail(f"has type {column.type}, a list is needed", name)
        offsets = column.offsets.to_numpy().astype(np.int64)
        if offsets.size == 0:
            offsets = np.zeros(1, dtype=np.int64)
        return offsets - offsets[0], column.flatten()

    def same_lengths(self, expected: Ints, found: Ints, name: str, other: str) -> None:
        if not np.array_equal(expected, found):
            row = int(np.nonzero(np.diff(expected) != np.diff(found))[0][0])
            raise self.fail(f"its lists differ in length from those of {other}", name, row)


def read_rows(file: Path, row_group: int, columns: Columns) -> UserRows:
    """Decode and check one row group.

    Raises:
        DataError: missing or unreadable file, missing column, null, unequal list lengths, id outside its
            table, history out of order, or a request that could see its own time.
    """
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            missing = sorted(set(columns.names()) - set(parquet.schema_arrow.names))
            if missing:
                raise DataError("no such column in the file", file=file, column=missing[0])
            table = parquet.read_row_group(row_group, columns=columns.names())
    except FileNotFoundError:
        raise DataError("no such file; ingest the log again", file=file) from None
    except PARQUET_ERRORS as error:
        raise DataError(f"unreadable: {error}", file=file, row_group=row_group) from None
    return _decode(_Group(file, row_group, table), columns)


def _decode(group: _Group, columns: Columns) -> UserRows:
    history_offsets, times = group.lists("history_timestamp")
    request_offsets, request_times = group.lists("request_timestamp")
    history = {f: _history_ids(group, f, rows, history_offsets) for f, rows in columns.rows.items()}
    candidate_offsets, candidates = _candidates(group, columns, request_offsets)
    labels = [_labels(group, task, candidate_offsets) for task in columns.tasks]
    rows = UserRows(
        user_id=group.ints("user_id"),
        history_offsets=history_offsets,
        request_offsets=request_offsets,
        history=history,
        history_time=group.flat(times, "history_timestamp", np.int64),
        request_id=_request_values(group, "request_id", request_offsets),
        request_time=group.flat(request_times, "request_timestamp", np.int64),
        history_end=_request_values(group, "request_history_end", request_offsets),
        candidate_offsets=candidate_offsets,
        candidates=candidates,
        labels=np.stack(labels, axis=1),
    )
    _check_time(group, rows)
    return rows


def _history_ids(group: _Group, feature: str, rows: int, offsets: Ints) -> Ints:
    name = f"history_{feature}"
    found, values = group.lists(name)
    group.same_lengths(offsets, found, name, "history_timestamp")
    return _checked_ids(group, name, group.flat(values, name, np.int64), rows, offsets)


def _checked_ids(group: _Group, name: str, ids: Ints, rows: int, offsets: Ints) -> Ints:
    if ids.size and (ids.min() < 0 or ids.max() >= rows):
        at = int(np.nonzero((ids < 0) | (ids >= rows))[0][0])
        row = int(np.searchsorted(offsets, at, side="right")) - 1
        raise group.fail(f"id {ids[at]} lies outside the table of {rows} rows", name, row)
    return ids


def _request_values(group: _Group, name: str, request_offsets: Ints) -> Ints:
    found, values = group.lists(name)
    group.same_lengths(request_offsets, found, name, "request_timestamp")
    return group.flat(values, name, np.int64)


def _candidates(group: _Group, columns: Columns, request_offsets: Ints) -> tuple[Ints, dict[str, Ints]]:
    offsets: Ints | None = None
    first = ""
    flat: dict[str, Ints] = {}
    for feature, rows in columns.rows.items():
        name = f"candidate_{feature}"
        outer, requests = group.lists(name)
        group.same_lengths(request_offsets, outer, name, "request_timestamp")
        found, values = group.unnest(requests, name)
        if offsets is None:
            offsets, first = found, name
        group.same_lengths(offsets, found, name, first)
        flat[feature] = _checked_ids(group, name, group.flat(values, name, np.int64), rows, offsets)
    if offsets is None:
        raise group.fail("the log declares no features", "candidate_*")
    return offsets, flat


def _labels(group: _Group, task: str, candidate_offsets: Ints) -> Floats:
    name = f"label_{task}"
    _, requests = group.lists(name)
    found, values = group.unnest(requests, name)
    group.same_lengths(candidate_offsets, found, name, "the candidates")
    labels = group.flat(values, name, np.float32)
    if not np.isfinite(labels).all():
        raise group.fail("holds NaN or infinity", name)
    return labels


def _check_time(group: _Group, rows: UserRows) -> None:
    """Histories ascend, and the newest behavior a request may see is strictly older than the request."""
    lengths = np.diff(rows.history_offsets)
    falls = np.nonzero(np.diff(rows.history_time) < 0)[0] + 1
    inside = falls[~np.isin(falls, rows.history_offsets)]
    if inside.size:
        row = int(np.searchsorted(rows.history_offsets, inside[0], side="right")) - 1
        raise group.fail("the history is not in time order", "history_timestamp", row)
    owner = np.repeat(np.arange(lengths.size), np.diff(rows.request_offsets))
    bad = (rows.history_end < 0) | (rows.history_end > lengths[owner])
    if bad.any():
        at = int(np.nonzero(bad)[0][0])
        raise group.fail(
            f"{rows.history_end[at]} lies outside the history of {lengths[owner[at]]} behaviors",
            "request_history_end",
            int(owner[at]),
        )
    seen = np.nonzero(rows.history_end > 0)[0]
    newest = rows.history_time[rows.history_offsets[owner[seen]] + rows.history_end[seen] - 1]
    late = np.nonzero(newest >= rows.request_time[seen])[0]
    if late.size:
        at = int(seen[late[0]])
        raise group.fail(
            f"request {rows.request_id[at]} would see a behavior at or after its own time",
            "request_history_end",
            int(owner[at]),
        )
