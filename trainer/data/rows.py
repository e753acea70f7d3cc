"""Decoding one row group of a sequence log into flat numpy arrays, with every check a bad log can fail.

Ids are checked here, because a sharded table silently maps a bad id to row 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.errors import DataError
from trainer.data.row_group import LONGEST, FeatureIds, Floats, GroupColumns, Ints, offsets_of, read_group
from trainer.log.schema import CLUSTER_COLUMNS, FeatureInfo, LogManifest


@dataclass(frozen=True)
class Columns:
    """Which columns are read, and the table rows that ids must stay below.

    Attributes:
        features, context: as in the log's manifest, with `rows` of the model's tables.
        tasks, numeric: names of labels and numbers; weighted: whether candidates have a weight.
        chunk: behaviors of a chunk whose clusters are read; 0 = no clusters.
    """

    features: Mapping[str, FeatureInfo]
    tasks: Sequence[str]
    context: Mapping[str, FeatureInfo] = field(default_factory=dict)
    numeric: Sequence[str] = ()
    weighted: bool = False
    chunk: int = 0

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
        names += CLUSTER_COLUMNS if self.chunk else ()
        names += [f"history_{name}" for name, info in self.features.items() if info.of_behaviors]
        names += [f"candidate_{name}" for name, info in self.features.items() if info.of_candidates]
        names += [f"context_{name}" for name in self.context] + [f"numeric_{name}" for name in self.numeric]
        return names + [f"label_{task}" for task in self.tasks] + (["weight"] if self.weighted else [])


PLAN_COLUMNS = ("request_history_end", "request_num_candidates")


@dataclass(frozen=True)
class UserRows:
    """The rows of one row group, flattened. Offsets have one entry more than what they delimit.

    Attributes:
        user_id: [U].
        history_offsets: [U + 1] into the behaviors; request_offsets: [U + 1] into the requests.
        history: ids of the behaviors; history_time: [behaviors].
        request_id, request_time, history_end: [requests]; history_end counts from the row's first behavior.
        candidate_offsets: [requests + 1] into the candidates.
        candidates, context: ids of the candidates and of the requests.
        labels: [candidates, tasks]; numeric: [candidates, numbers]; weight: [candidates].
        cluster_size, cluster_time: [behaviors], of the cluster that a behavior stands for; None = not read.
    """

    user_id: Ints
    history_offsets: Ints
    request_offsets: Ints
    history: FeatureIds
    history_time: Ints
    request_id: Ints
    request_time: Ints
    history_end: Ints
    candidate_offsets: Ints
    candidates: FeatureIds
    context: FeatureIds
    labels: Floats
    numeric: Floats
    weight: Floats
    cluster_size: Ints | None = None
    cluster_time: Ints | None = None

    @staticmethod
    def of_counts(
        behaviors: Ints,
        requests: Ints,
        candidate_counts: Ints,
        *,
        context: FeatureIds | None = None,
        numeric: Floats | None = None,
        **columns: Any,
    ) -> UserRows:
        """Rows that no file holds: requests are numbered, and every candidate weighs 1.

        Args:
            behaviors, requests: [U], of each user; candidate_counts: [requests], candidates of each.
            context, numeric: none, where they are left out; columns: the other attributes.
        """
        total, count = int(candidate_counts.sum()), int(requests.sum())
        return UserRows(
            history_offsets=offsets_of(behaviors),
            request_offsets=offsets_of(requests),
            candidate_offsets=offsets_of(candidate_counts),
            request_id=np.arange(count),
            context=FeatureIds([], np.zeros((0, count), dtype=np.int64), {}) if context is None else context,
            numeric=np.zeros((total, 0), dtype=np.float32) if numeric is None else numeric,
            weight=np.broadcast_to(np.float32(1), total),
            **columns,
        )


@dataclass(frozen=True)
class PlanRows:
    """What cutting blocks needs to know of a row group: lengths only.

    Attributes:
        request_offsets: [U + 1]; history_end, candidates: [requests].
    """

    request_offsets: Ints
    history_end: Ints
    candidates: Ints


def read_rows(
    file: Path, row_group: int, columns: Columns, footer: pq.FileMetaData | None = None
) -> UserRows:
    """Decode and check one row group; `footer` is the file's, if it was read before.

    Raises:
        DataError: missing or unreadable file, missing column, null, unequal list lengths, id outside its
            table, history out of order, or a request that could see its own time.
    """
    return _decode(read_group(file, row_group, columns.names(), footer), columns)


def read_plan(file: Path, row_group: int, footer: pq.FileMetaData | None = None) -> PlanRows:
    """Only the lengths of a row group: a few bytes a request, whatever the histories hold.

    Raises:
        DataError: missing or unreadable file, missing column, null, unequal list lengths or negative numbers.
    """
    group = read_group(file, row_group, PLAN_COLUMNS, footer)
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
        if values.size and (values.min() < 0 or values.max() > LONGEST):
            raise group.fail("has impossible counts; ingest the events again", name)
    return plan


def _decode(group: GroupColumns, columns: Columns) -> UserRows:
    history_offsets, times = group.lists("history_timestamp")
    request_offsets, request_times = group.lists("request_timestamp")
    candidate_offsets = _candidate_offsets(group, request_offsets)
    features = columns.features.items()
    rows = UserRows(
        user_id=group.ints("user_id"),
        history_offsets=history_offsets,
        request_offsets=request_offsets,
        history=group.features(
            "history",
            {name: info for name, info in features if info.of_behaviors},
            history_offsets,
            lambda column: _one_level(group, column, history_offsets, "history_timestamp"),
        ),
        history_time=group.flat(times, "history_timestamp", np.int64),
        request_id=_request_values(group, "request_id", request_offsets),
        request_time=group.flat(request_times, "request_timestamp", np.int64),
        history_end=_request_values(group, "request_history_end", request_offsets),
        candidate_offsets=candidate_offsets,
        candidates=group.features(
            "candidate",
            {name: info for name, info in features if info.of_candidates},
            candidate_offsets,
            lambda column: _two_levels(group, column, request_offsets, candidate_offsets),
        ),
        context=group.features(
            "context",
            columns.context,
            request_offsets,
            lambda column: _one_level(group, column, request_offsets, "request_timestamp"),
        ),
        labels=_labels(group, columns.tasks, request_offsets, candidate_offsets),
        numeric=_numbers(
            group, [f"numeric_{n}" for n in columns.numeric], request_offsets, candidate_offsets
        ),
        weight=_weight(group, columns, request_offsets, candidate_offsets),
        **(_clusters(group, history_offsets) if columns.chunk else {}),
    )
    _check_time(group, rows)
    return rows


def _candidate_offsets(group: GroupColumns, request_offsets: Ints) -> Ints:
    """From the planned counts; every candidate column must agree with them."""
    counts = _request_values(group, "request_num_candidates", request_offsets)
    if counts.size and (counts.min() < 0 or counts.sum() > LONGEST):
        raise group.fail("has impossible counts", "request_num_candidates")
    return offsets_of(counts)


def _one_level(group: GroupColumns, column: str, offsets: Ints, other: str) -> pa.Array:
    found, values = group.lists(column)
    group.same_lengths(offsets, found, column, other)
    return values


def _two_levels(group: GroupColumns, column: str, request_offsets: Ints, candidate_offsets: Ints) -> pa.Array:
    outer, requests = group.lists(column)
    group.same_lengths(request_offsets, outer, column, "request_timestamp")
    found, values = group.unnest(requests, column)
    group.same_lengths(candidate_offsets, found, column, "request_num_candidates")
    return values


def _numbers(
    group: GroupColumns, names: Sequence[str], request_offsets: Ints, candidate_offsets: Ints
) -> Floats:
    found = np.zeros((int(candidate_offsets[-1]), len(names)), dtype=np.float32)
    for place, name in enumerate(names):
        values = _two_levels(group, name, request_offsets, candidate_offsets)
        found[:, place] = group.flat(values, name, np.float32)
        if not np.isfinite(found[:, place]).all():
            raise group.fail("holds NaN or infinity", name)
    return found


def _labels(
    group: GroupColumns, tasks: Sequence[str], request_offsets: Ints, candidate_offsets: Ints
) -> Floats:
    labels = _numbers(group, [f"label_{task}" for task in tasks], request_offsets, candidate_offsets)
    for place, task in enumerate(tasks):
        values = labels[:, place]
        if values.size and (values.min() < 0 or values.max() > 1):
            problem = f"holds {values.min():g} to {values.max():g}, and a label is 0 to 1"
            raise group.fail(f"{problem}; ingest the events again", f"label_{task}")
    return labels


def _weight(group: GroupColumns, columns: Columns, request_offsets: Ints, candidate_offsets: Ints) -> Floats:
    if not columns.weighted:
        return np.broadcast_to(np.float32(1), int(candidate_offsets[-1]))
    weight = _numbers(group, ["weight"], request_offsets, candidate_offsets)[:, 0]
    if weight.size and weight.min() < 0:
        raise group.fail(f"{weight.min()} is negative", "weight")
    return weight


def _clusters(group: GroupColumns, history_offsets: Ints) -> dict[str, Ints]:
    found = {}
    for name in CLUSTER_COLUMNS:
        values = _one_level(group, name, history_offsets, "history_timestamp")
        found[name] = group.flat(values, name, np.int64)
        if found[name].size and found[name].min() < 0:
            raise group.fail("holds negative numbers; cluster the log again", name)
    return found


def _request_values(group: GroupColumns, name: str, request_offsets: Ints) -> Ints:
    return group.flat(_one_level(group, name, request_offsets, "request_timestamp"), name, np.int64)


def _check_time(group: GroupColumns, rows: UserRows) -> None:
    """Histories ascend, and the newest behavior a request may see is strictly older than the request."""
    lengths = np.diff(rows.history_offsets)
    falls = np.nonzero(rows.history_time[1:] < rows.history_time[:-1])[0] + 1
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
