"""Decoding one row group of a sequence log into flat numpy arrays, with every check a bad log can fail.

Ids are checked here, because a sharded table silently maps a bad id to row 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.errors import DataError
from trainer.config.tasks import Task
from trainer.data.domain import DomainColumn
from trainer.data.labels import TaskLabels
from trainer.data.row_group import LONGEST, FeatureIds, Floats, GroupColumns, read_group
from trainer.data.similarity.similarity import Similarity
from trainer.log.bags import Ints, offsets_of
from trainer.log.schema import CLUSTER_COLUMNS, FeatureInfo, LogManifest


@dataclass(frozen=True)
class Columns:
    """Which columns are read, and the table rows that ids must stay below.

    Attributes:
        features, context: as in the log's manifest, with `rows` of the model's tables. An encoded number has
            its own name here, whatever its parts.
        labels: of the tasks; numeric: names of numbers; weighted: whether candidates have a weight.
        chunk: behaviors of a chunk whose clusters are read; 0 = no clusters.
        domain: None = candidates have none. similarities: that candidates have besides.
    """

    features: Mapping[str, FeatureInfo]
    labels: TaskLabels
    context: Mapping[str, FeatureInfo] = field(default_factory=dict)
    numeric: Sequence[str] = ()
    weighted: bool = False
    chunk: int = 0
    domain: DomainColumn | None = None
    similarities: Sequence[Similarity] = ()

    @staticmethod
    def of(
        manifest: LogManifest,
        rows: Mapping[str, int] | None = None,
        tasks: Sequence[Task] | None = None,
        domain: str = "",
    ) -> Columns:
        """The columns of a log.

        Args:
            rows: the table rows of features the model uses, and only those are read; None means all. A number
                is read where the model uses any part of it.
            tasks: whose labels are read; None means all labels.
            domain: the feature that is a candidate's domain, read whether the model uses it or not.

        Raises:
            DataError: the model needs a feature that the log lacks.
            ConfigError: the domain is no single feature of candidates or requests.
        """
        known = {**manifest.table_features, **manifest.table_context}
        lacking = sorted(set(rows or ()) - set(known))
        if lacking:
            raise DataError(f"the log has no feature {lacking[0]!r}; it has {', '.join(known)}")
        numbers = {known[name].field for name in rows or () if known[name].field}

        def used(infos: Mapping[str, FeatureInfo]) -> dict[str, FeatureInfo]:
            if rows is None:
                return dict(infos)
            return {
                name: info if info.encoder else info.model_copy(update={"rows": rows[name]})
                for name, info in infos.items()
                if name in numbers or (name in rows and not info.encoder)
            }

        column = DomainColumn.of(manifest, domain) if domain else None
        if column is not None and rows is not None and domain in rows:
            column = replace(column, rows=rows[domain])
        return Columns(
            used(manifest.features),
            TaskLabels.of(manifest, tasks),
            used(manifest.context),
            manifest.numeric,
            manifest.weighted,
            domain=column,
        )

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks."""
        return self.labels.names

    def names(self) -> list[str]:
        names = ["user_id", "history_timestamp", *PLAN_COLUMNS, "request_id", "request_timestamp"]
        names += CLUSTER_COLUMNS if self.chunk else ()
        names += [f"history_{name}" for name, info in self.features.items() if info.of_behaviors]
        names += [f"candidate_{name}" for name, info in self.features.items() if info.of_candidates]
        names += [f"context_{name}" for name in self.context] + [f"numeric_{name}" for name in self.numeric]
        names += self.labels.columns + (["weight"] if self.weighted else [])
        # The domain may be a feature that is read anyway.
        return list(dict.fromkeys(names + ([self.domain.name] if self.domain else [])))


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
        labels: [candidates, T], of the tasks, NaN where a task was not observed.
        numeric: [candidates, numbers]; weight: [candidates].
        task_weight: [candidates, T]; None where no label has weights. domain: [candidates]; None = not read.
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
    task_weight: Floats | None = None
    domain: Ints | None = None

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
        request_offsets: [U + 1]; history_end, candidates: [requests]; users: [U] ids, where they were read.
        domain: [candidates], where it was read.
    """

    request_offsets: Ints
    history_end: Ints
    candidates: Ints
    users: Ints | None = None
    domain: Ints | None = None

    @property
    def cost(self) -> int:
        """What balances ranks: candidates, and behaviors that some request sees."""
        if not self.history_end.size:
            return 0
        starts = self.request_offsets[:-1][np.diff(self.request_offsets) > 0]
        return int(self.candidates.sum() + np.maximum.reduceat(self.history_end, starts).sum())


def read_rows(
    file: Path, row_group: int, columns: Columns, footer: pq.FileMetaData | None = None
) -> UserRows:
    """Decode and check one row group; `footer` is the file's, if it was read before.

    Raises:
        DataError: missing or unreadable file, missing column, null, unequal list lengths, id outside its
            table, history out of order, or a request that could see its own time.
    """
    return _Decoder(read_group(file, row_group, columns.names(), footer)).rows(columns)


def read_plan(
    file: Path,
    row_group: int,
    footer: pq.FileMetaData | None = None,
    users: bool = False,
    domain: DomainColumn | None = None,
) -> PlanRows:
    """Only the lengths of a row group: a few bytes a request, whatever the histories hold.

    Args:
        footer: the file's, if it was read before; users: whether the users' ids are read, too; domain: the
            domain of each candidate is read, too.

    Raises:
        DataError: missing or unreadable file, missing column, null, unequal list lengths or negative numbers,
            or a domain outside its table.
    """
    names = [*PLAN_COLUMNS, *(["user_id"] if users else []), *([domain.name] if domain else [])]
    group = read_group(file, row_group, names, footer)
    offsets, ends = group.lists("request_history_end")
    count_offsets, counts = group.lists("request_num_candidates")
    group.same_lengths(offsets, count_offsets, "request_num_candidates", "request_history_end")
    flat = [group.flat(part, name, np.int64) for part, name in zip((ends, counts), PLAN_COLUMNS, strict=True)]
    for name, values in zip(PLAN_COLUMNS, flat, strict=True):
        if values.size and (values.min() < 0 or values.max() > LONGEST):
            raise group.fail("has impossible counts; ingest the events again", name)
    plan = PlanRows(offsets, flat[0], flat[1], group.ints("user_id") if users else None)
    return plan if domain is None else replace(plan, domain=_planned_domain(group, domain, plan))


def _planned_domain(group: GroupColumns, column: DomainColumn, plan: PlanRows) -> Ints:
    """The domain of each candidate, [candidates]."""
    offsets, values = group.lists(column.name)
    group.same_lengths(plan.request_offsets, offsets, column.name, "request_history_end")
    if column.of_requests:
        return np.repeat(group.ids(values, column.name, column.rows, offsets), plan.candidates)
    each, values = group.unnest(values, column.name)
    group.same_lengths(offsets_of(plan.candidates), each, column.name, "request_num_candidates")
    return group.ids(values, column.name, column.rows, each[offsets])


class _Decoder:
    """Takes the columns of a row group apart: values per behavior, per request and per candidate."""

    def __init__(self, group: GroupColumns) -> None:
        self.group = group
        self.history_offsets, self._history_times = group.lists("history_timestamp")
        self.request_offsets, self._request_times = group.lists("request_timestamp")
        # The planned counts; every candidate column must agree with them.
        counts = self._request_values("request_num_candidates")
        if counts.size and (counts.min() < 0 or counts.sum() > LONGEST):
            raise group.fail("has impossible counts", "request_num_candidates")
        self.candidate_offsets = offsets_of(counts)

    def rows(self, columns: Columns) -> UserRows:
        """All columns, checked one by one and against each other."""
        group, features = self.group, columns.features.items()
        of_behaviors = {name: info for name, info in features if info.of_behaviors}
        of_candidates = {name: info for name, info in features if info.of_candidates}
        labels, task_weight = self._labels(columns.labels)
        weight: Floats = np.broadcast_to(np.float32(1), labels.shape[:1])
        if columns.weighted:
            weight = self._weights("weight")
        clusters = {}
        for name in CLUSTER_COLUMNS if columns.chunk else ():
            clusters[name] = group.flat(self._per_behavior(name), name, np.int64)
            if clusters[name].size and clusters[name].min() < 0:
                raise group.fail("holds negative numbers; cluster the log again", name)
        candidates = group.features("candidate", of_candidates, self.candidate_offsets, self._per_candidate)
        context = group.features("context", columns.context, self.request_offsets, self._per_request)
        rows = UserRows(
            user_id=group.ints("user_id"),
            history_offsets=self.history_offsets,
            request_offsets=self.request_offsets,
            history=group.features("history", of_behaviors, self.history_offsets, self._per_behavior),
            history_time=group.flat(self._history_times, "history_timestamp", np.int64),
            request_id=self._request_values("request_id"),
            request_time=group.flat(self._request_times, "request_timestamp", np.int64),
            history_end=self._request_values("request_history_end"),
            candidate_offsets=self.candidate_offsets,
            candidates=candidates,
            context=context,
            labels=labels,
            numeric=self._numbers([f"numeric_{name}" for name in columns.numeric]),
            weight=weight,
            task_weight=task_weight,
            domain=self._domain(columns.domain, candidates, context),
            **clusters,
        )
        _check_time(group, rows)
        return rows

    def _per_behavior(self, column: str) -> pa.Array:
        offsets, values = self.group.lists(column)
        self.group.same_lengths(self.history_offsets, offsets, column, "history_timestamp")
        return values

    def _per_request(self, column: str) -> pa.Array:
        offsets, values = self.group.lists(column)
        self.group.same_lengths(self.request_offsets, offsets, column, "request_timestamp")
        return values

    def _per_candidate(self, column: str) -> pa.Array:
        offsets, values = self.group.unnest(self._per_request(column), column)
        self.group.same_lengths(self.candidate_offsets, offsets, column, "request_num_candidates")
        return values

    def _request_values(self, name: str) -> Ints:
        return self.group.flat(self._per_request(name), name, np.int64)

    def _labels(self, wanted: TaskLabels) -> tuple[Floats, Floats | None]:
        """Labels and sample weights of the tasks, see `UserRows`."""
        found = {}
        for label in wanted.labels:
            name, partial = f"label_{label}", label in wanted.partial
            found[label] = values = self.group.labels(self._per_candidate(name), name, partial)
            # A comparison with NaN is false.
            if ((values < 0) | (values > 1)).any():
                problem = f"holds {np.nanmin(values):g} to {np.nanmax(values):g}, and a label is 0 to 1"
                raise self.group.fail(f"{problem}; ingest the events again", name)
        weights = {label: self._weights(f"weight_{label}") for label in wanted.weights}
        count = int(self.candidate_offsets[-1])
        return wanted.of_tasks(found, count), wanted.weights_of_tasks(weights, count)

    def _weights(self, name: str) -> Floats:
        weight = self._numbers([name])[:, 0]
        if weight.size and weight.min() < 0:
            raise self.group.fail(f"{weight.min()} is negative", name)
        return weight

    def _domain(
        self, column: DomainColumn | None, candidates: FeatureIds, context: FeatureIds
    ) -> Ints | None:
        """The domain of each candidate; the feature need not be one that the model reads."""
        if column is None:
            return None
        info = {column.feature: FeatureInfo(rows=column.rows)}
        if column.of_requests and column.feature not in context:
            context = self.group.features("context", info, self.request_offsets, self._per_request)
        elif not column.of_requests and column.feature not in candidates:
            candidates = self.group.features("candidate", info, self.candidate_offsets, self._per_candidate)
        return column.of_candidates(candidates, context, np.diff(self.candidate_offsets))

    def _numbers(self, names: Sequence[str]) -> Floats:
        numbers = np.zeros((int(self.candidate_offsets[-1]), len(names)), dtype=np.float32)
        for place, name in enumerate(names):
            numbers[:, place] = self.group.flat(self._per_candidate(name), name, np.float32)
            if not np.isfinite(numbers[:, place]).all():
                raise self.group.fail("holds NaN or infinity", name)
        return numbers


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
    nonempty = np.nonzero(rows.history_end > 0)[0]
    newest = rows.history_time[rows.history_offsets[owner[nonempty]] + rows.history_end[nonempty] - 1]
    late = np.nonzero(newest >= rows.request_time[nonempty])[0]
    if late.size:
        at = int(nonempty[late[0]])
        raise group.fail(
            f"request {rows.request_id[at]} would see a behavior at or after its own time",
            "request_history_end",
            int(owner[at]),
        )
