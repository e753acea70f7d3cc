"""Decoding one row group of a sequence log into flat numpy arrays, with every check a bad log can fail.

Ids are checked here, because a sharded table silently maps a bad id to row 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.errors import DataError
from trainer.data.schema import FeatureInfo, LogManifest

# What pyarrow raises on a damaged file; a name that is no UTF-8 any more surfaces as a ValueError.
PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError)
# A list offset beyond this is damage, not data; it bounds what a bad file can make us allocate.
_LONGEST = 1 << 31

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Columns:
    """Which columns are read, and the table rows that ids must stay below.

    Attributes:
        features, context: as in the log's manifest, with `rows` of the model's tables.
        tasks, numeric: names of labels and numbers; weighted: whether candidates have a weight.
    """

    features: Mapping[str, FeatureInfo]
    tasks: Sequence[str]
    context: Mapping[str, FeatureInfo] = field(default_factory=dict)
    numeric: Sequence[str] = ()
    weighted: bool = False

    @staticmethod
    def of(manifest: LogManifest, rows: Mapping[str, int] | None = None) -> Columns:
        """All columns of a log; `rows` gives the table rows of features the model uses, and reads only those.

        Raises:
            DataError: the model needs a feature that the log lacks.
        """
        known = {**manifest.features, **manifest.context}
        lacking = sorted(set(rows or ()) - set(known))
        if lacking:
            raise DataError(f"the log has no feature {lacking[0]!r}; it has {', '.join(known)}")

        def used(infos: Mapping[str, FeatureInfo]) -> dict[str, FeatureInfo]:
            if rows is None:
                return dict(infos)
            return {n: info.model_copy(update={"rows": rows[n]}) for n, info in infos.items() if n in rows}

        return Columns(
            used(manifest.features),
            manifest.tasks,
            used(manifest.context),
            manifest.numeric,
            manifest.weighted,
        )

    def names(self) -> list[str]:
        names = ["user_id", "history_timestamp", *PLAN_COLUMNS, "request_id", "request_timestamp"]
        names += [f"history_{name}" for name, info in self.features.items() if info.of_behaviors]
        names += [f"candidate_{name}" for name, info in self.features.items() if info.of_candidates]
        names += [f"context_{name}" for name in self.context] + [f"numeric_{name}" for name in self.numeric]
        return names + [f"label_{task}" for task in self.tasks] + (["weight"] if self.weighted else [])


PLAN_COLUMNS = ("request_history_end", "request_num_candidates")


@dataclass(frozen=True)
class Bags:
    """Ids of consecutive behaviors, candidates or requests: one each, or several.

    Attributes:
        values: the ids; offsets: [n + 1] where the ids of each begin, None with one id each.
    """

    values: Ints
    offsets: Ints | None = None

    def part(self, begin: int, end: int) -> Bags:
        """The bags [begin, end)."""
        if self.offsets is None:
            return Bags(self.values[begin:end])
        offsets = self.offsets[begin : end + 1]
        return Bags(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])

    def take(self, chosen: Ints) -> Bags:
        """The chosen bags, in that order."""
        if self.offsets is None:
            return Bags(self.values[chosen])
        lengths = np.diff(self.offsets)[chosen]
        starts = np.repeat(self.offsets[chosen] - (np.cumsum(lengths) - lengths), lengths)
        return Bags(self.values[starts + np.arange(lengths.sum())], np.r_[0, np.cumsum(lengths)])

    def lengths(self, count: int) -> npt.NDArray[np.int32]:
        if self.offsets is None:
            return np.ones(count, dtype=np.int32)
        return np.diff(self.offsets).astype(np.int32)


@dataclass(frozen=True)
class UserRows:
    """The rows of one row group, flattened. Offsets have one entry more than what they delimit.

    Attributes:
        user_id: [U].
        history_offsets: [U + 1] into the behaviors; request_offsets: [U + 1] into the requests.
        history: feature -> bags of the behaviors; history_time: [behaviors].
        request_id, request_time, history_end: [requests]; history_end counts from the row's first behavior.
        candidate_offsets: [requests + 1] into the candidates.
        candidates: feature -> bags of the candidates; context: feature -> bags of the requests.
        labels: [candidates, tasks]; numeric: [candidates, numbers]; weight: [candidates].
    """

    user_id: Ints
    history_offsets: Ints
    request_offsets: Ints
    history: Mapping[str, Bags]
    history_time: Ints
    request_id: Ints
    request_time: Ints
    history_end: Ints
    candidate_offsets: Ints
    candidates: Mapping[str, Bags]
    context: Mapping[str, Bags]
    labels: Floats
    numeric: Floats
    weight: Floats


@dataclass(frozen=True)
class PlanRows:
    """What cutting blocks needs to know of a row group: lengths only.

    Attributes:
        request_offsets: [U + 1]; history_end, candidates: [requests].
    """

    request_offsets: Ints
    history_end: Ints
    candidates: Ints


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
        return self.unnest(self.column(name), name)

    def unnest(self, column: pa.Array, name: str) -> tuple[Ints, pa.Array]:
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            raise self.fail(f"has type {column.type}, a list is needed", name)
        if column.null_count:
            raise self.fail("holds nulls inside its lists", name)
        offsets = column.offsets.to_numpy().astype(np.int64)
        if offsets.size == 0:
            offsets = np.zeros(1, dtype=np.int64)
        if (np.diff(offsets) < 0).any() or offsets[-1] - offsets[0] > _LONGEST:
            raise self.fail("has impossible list lengths", name)
        return offsets - offsets[0], column.flatten()

    def same_lengths(self, expected: Ints, found: Ints, name: str, other: str) -> None:
        if not np.array_equal(expected, found):
            row = None
            if expected.size == found.size:
                row = int(np.nonzero(np.diff(expected) != np.diff(found))[0][0])
            raise self.fail(f"its lists differ in length from those of {other}", name, row)

    def bags(self, values: pa.Array, name: str, info: FeatureInfo, owners: Ints) -> Bags:
        """Ids of a feature, checked against its table; `owners` delimits rows (or requests) for the error."""
        if not info.multi:
            return Bags(self.ids(values, name, info.rows, owners))
        offsets, items = self.unnest(values, name)
        return Bags(self.ids(items, name, info.rows, offsets[owners]), offsets)

    def ids(self, values: pa.Array, name: str, rows: int, owners: Ints) -> Ints:
        ids: Ints = self.flat(values, name, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= rows):
            at = int(np.nonzero((ids < 0) | (ids >= rows))[0][0])
            row = int(np.searchsorted(owners, at, side="right")) - 1
            raise self.fail(f"id {ids[at]} lies outside the table of {rows} rows", name, row)
        return ids


def read_rows(file: Path, row_group: int, columns: Columns) -> UserRows:
    """Decode and check one row group.

    Raises:
        DataError: missing or unreadable file, missing column, null, unequal list lengths, id outside its
            table, history out of order, or a request that could see its own time.
    """
    return _decode(_read(file, row_group, columns.names()), columns)


def read_plan(file: Path, row_group: int) -> PlanRows:
    """Only the lengths of a row group: a few bytes a request, whatever the histories hold."""
    group = _read(file, row_group, PLAN_COLUMNS)
    offsets, ends = group.lists("request_history_end")
    found, counts = group.lists("request_num_candidates")
    group.same_lengths(offsets, found, "request_num_candidates", "request_history_end")
    plan = PlanRows(
        offsets,
        group.flat(ends, "request_history_end", np.int64),
        group.flat(counts, "request_num_candidates", np.int64),
    )
    for name, values in (
        ("request_history_end", plan.history_end),
        ("request_num_candidates", plan.candidates),
    ):
        if values.size and values.min() < 0:
            raise group.fail(f"{values.min()} is negative; ingest the events again", name)
    return plan


def _read(file: Path, row_group: int, names: Sequence[str]) -> _Group:
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            missing = sorted(set(names) - set(parquet.schema_arrow.names))
            if missing:
                raise DataError("no such column in the file", file=file, column=missing[0])
            table = parquet.read_row_group(row_group, columns=list(names), use_threads=False)
    except FileNotFoundError:
        raise DataError("no such file; ingest the log again", file=file) from None
    except PARQUET_ERRORS as error:
        raise DataError(f"unreadable: {error}", file=file, row_group=row_group) from None
    return _Group(file, row_group, table)


def _decode(group: _Group, columns: Columns) -> UserRows:
    history_offsets, times = group.lists("history_timestamp")
    request_offsets, request_times = group.lists("request_timestamp")
    candidate_offsets = _candidate_offsets(group, request_offsets)
    rows = UserRows(
        user_id=group.ints("user_id"),
        history_offsets=history_offsets,
        request_offsets=request_offsets,
        history={
            name: _one_level(group, f"history_{name}", info, history_offsets, "history_timestamp")
            for name, info in columns.features.items()
            if info.of_behaviors
        },
        history_time=group.flat(times, "history_timestamp", np.int64),
        request_id=_request_values(group, "request_id", request_offsets),
        request_time=group.flat(request_times, "request_timestamp", np.int64),
        history_end=_request_values(group, "request_history_end", request_offsets),
        candidate_offsets=candidate_offsets,
        candidates={
            name: group.bags(
                _two_levels(group, column, request_offsets, candidate_offsets),
                column,
                info,
                candidate_offsets,
            )
            for name, info in columns.features.items()
            if info.of_candidates
            for column in [f"candidate_{name}"]
        },
        context={
            name: _one_level(group, f"context_{name}", info, request_offsets, "request_timestamp")
            for name, info in columns.context.items()
        },
        labels=_numbers(
            group, [f"label_{task}" for task in columns.tasks], request_offsets, candidate_offsets
        ),
        numeric=_numbers(
            group, [f"numeric_{n}" for n in columns.numeric], request_offsets, candidate_offsets
        ),
        weight=_weight(group, columns, request_offsets, candidate_offsets),
    )
    _check_time(group, rows)
    return rows


def _candidate_offsets(group: _Group, request_offsets: Ints) -> Ints:
    """From the planned counts; every candidate column must agree with them."""
    counts = _request_values(group, "request_num_candidates", request_offsets)
    if counts.size and (counts.min() < 0 or counts.sum() > _LONGEST):
        raise group.fail("has impossible counts", "request_num_candidates")
    offsets: Ints = np.r_[0, np.cumsum(counts)]
    return offsets


def _one_level(group: _Group, column: str, info: FeatureInfo, offsets: Ints, other: str) -> Bags:
    found, values = group.lists(column)
    group.same_lengths(offsets, found, column, other)
    return group.bags(values, column, info, offsets)


def _two_levels(group: _Group, column: str, request_offsets: Ints, candidate_offsets: Ints) -> pa.Array:
    outer, requests = group.lists(column)
    group.same_lengths(request_offsets, outer, column, "request_timestamp")
    found, values = group.unnest(requests, column)
    group.same_lengths(candidate_offsets, found, column, "request_num_candidates")
    return values


def _numbers(group: _Group, names: Sequence[str], request_offsets: Ints, candidate_offsets: Ints) -> Floats:
    found = np.zeros((int(candidate_offsets[-1]), len(names)), dtype=np.float32)
    for place, name in enumerate(names):
        values = _two_levels(group, name, request_offsets, candidate_offsets)
        found[:, place] = group.flat(values, name, np.float32)
        if not np.isfinite(found[:, place]).all():
            raise group.fail("holds NaN or infinity", name)
    return found


def _weight(group: _Group, columns: Columns, request_offsets: Ints, candidate_offsets: Ints) -> Floats:
    if not columns.weighted:
        return np.ones(int(candidate_offsets[-1]), dtype=np.float32)
    weight = _numbers(group, ["weight"], request_offsets, candidate_offsets)[:, 0]
    if weight.size and weight.min() < 0:
        raise group.fail(f"{weight.min()} is negative", "weight")
    return weight


def _request_values(group: _Group, name: str, request_offsets: Ints) -> Ints:
    found, values = group.lists(name)
    group.same_lengths(request_offsets, found, name, "request_timestamp")
    return group.flat(values, name, np.int64)


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
