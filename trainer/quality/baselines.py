"""Baselines that any trained model must beat, from the same log and on the same candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.errors import DataError
from trainer.config.sections import DataConfig
from trainer.data.blocks import with_windows
from trainer.data.files import check_files
from trainer.data.labels import TaskLabels
from trainer.data.reader import SequenceLogReader
from trainer.data.row_group import GroupColumns, read_group
from trainer.data.rows import Columns, UserRows, read_rows
from trainer.log.schema import LogManifest, read_manifest
from trainer.quality.leads import estimates, leads
from trainer.quality.metrics import calibration_metrics, group_keys
from trainer.quality.ranking import Floats, Ints, ranking_metrics
from trainer.quality.scored import Scored

# These are probabilities, the others only an order.
RATES = ("mean_label", "item_rate", "user_item_rate")
# Every user and item gets so many candidates with the mean label besides their own.
STRENGTH = 10.0


@dataclass(frozen=True)
class Baselines:
    """Scores that need no training, of every candidate of a split.

    Attributes:
        candidates: their names and labels, in the order of `Scored.in_order`; their scores have no meaning.
        scores: task -> baseline -> [n].
        missing: what could not be computed, and why.
        positives: [n, T], positives of each task that training has of the candidate's user, see `balance`;
            None where that is not known.
    """

    candidates: Scored
    scores: Mapping[str, Mapping[str, Floats]]
    missing: Sequence[str]
    positives: Floats | None = None

    def metrics(self, scored: Scored | None = None) -> dict[str, dict[str, dict[str, Any]]]:
        """Task -> baseline -> metrics by the names of `trainer.quality.metrics.Metrics`.

        Args:
            scored: a model's scores of the same candidates: then also how it compares, see `leads`.
        """
        table: dict[str, dict[str, dict[str, Any]]] = {}
        for task, (name, scores) in enumerate(self.scores.items()):
            part, observed = self.candidates.observed(task), ~np.isnan(self.candidates.label[:, task])
            groups, users = group_keys(part.user_id, part.request_id), group_keys(part.user_id)
            label = part.label[:, task]
            model = None
            if scored is not None:
                model = estimates(scored.score[observed, task], label, groups, users, probable=True)
            table[name] = {}
            for baseline, of_all in scores.items():
                score, probable = of_all[observed], baseline in RATES
                values: dict[str, Any] = {**ranking_metrics(score, label, groups, users)}
                if probable:
                    values |= calibration_metrics(score, label)
                if model is not None:
                    values |= leads(model, estimates(score, label, groups, users, probable))
                table[name][baseline] = values
        return table


def baselines(reader: SequenceLogReader) -> Baselines:
    """Baselines on the reader's split, whole histories whatever the window.

    `mean_label`, `item_rate`, `user_item_rate`: of the training split, for each task, see `label_rates`.
    `popularity`: how often the candidate's item occurred before validation.
    `item_count`: how often the user's own visible history holds the very item; `category_count`: the same
    of the finest taxonomy level. These three are no probabilities, and the same for every task.
    """
    manifest = read_manifest(reader.config.log)
    counted = {"item_count": "item_id"}
    if manifest.taxonomy:
        counted["category_count"] = counted_feature(manifest)
    read = _read(reader, manifest, counted)
    label, items = read["label"], read.get("item_id")
    order = np.lexsort((read["candidate"], read["request_id"], read["user_id"]))
    # Scores that are the same for every task.
    counts, missing = {name: read[name] for name in counted if name in read}, []
    if items is not None:
        try:
            popularity = item_counts(reader.config.log)
            # An item beyond the vocabulary has not occurred.
            counts = {"popularity": np.append(popularity, 0.0)[items.clip(max=popularity.size)], **counts}
        except DataError as error:
            missing.append(f"item popularity: {error}")
    rates, positives, problems = _rates(reader, manifest, read["user_id"], items)
    scores = {
        task: {name: values[order] for name, values in {**rates.get(task, {}), **counts}.items()}
        for task in reader.columns.tasks
    }
    user, request, candidate = (read[name] for name in ("user_id", "request_id", "candidate"))
    nothing, tasks = np.full(user.size, -1), tuple(reader.columns.tasks)
    candidates = Scored(label, label, user, request, candidate, nothing, nothing, tasks)
    of_users = None if positives is None else positives[order]
    return Baselines(candidates.part(order), scores, [*missing, *problems], of_users)


def _rates(
    reader: SequenceLogReader, manifest: LogManifest, users: Ints, items: Ints | None
) -> tuple[dict[str, dict[str, Floats]], Floats | None, list[str]]:
    """Task -> scores that training's labels decide; the users' positives; and what is missing of them.

    Training's files may be gone by the time a model is measured: then nothing else is the worse for it.
    """
    try:
        rates = label_rates(reader.config, manifest, reader.columns.labels, users, items)
    except DataError as error:
        return {}, None, [f"label rates: {error}"]
    of_tasks: dict[str, dict[str, Floats]] = {}
    missing = []
    for task, name in enumerate(reader.columns.tasks):
        if np.isnan(rates.overall[task]):
            missing.append(f"label rates of {name}: training has no label of it")
            continue
        of_tasks[name] = {"mean_label": np.broadcast_to(rates.overall[task], users.shape)}
        if reader.split == "train":
            continue
        if items is not None:
            of_tasks[name]["item_rate"] = rates.by_item[:, task]
        of_tasks[name]["user_item_rate"] = rates.by_both[:, task]
    if reader.split == "train":
        missing.append(
            "label rates of items and users: training would be measured on the labels they are made of"
        )
        return of_tasks, None, missing
    return of_tasks, rates.positives, missing


def by_baseline(table: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """`Baselines.metrics` as files hold them: baseline -> the first task and all of them.

    A task may lack a baseline that others have, such as rates of a task of which training has no label.
    """
    first, *_ = table.values()
    names = dict.fromkeys(name for rows in table.values() for name in rows)
    return {
        name: {
            **first.get(name, {}),
            "tasks": {task: rows[name] for task, rows in table.items() if name in rows},
        }
        for name in names
    }


def counted_feature(manifest: LogManifest) -> str:
    """What `category_count` counts."""
    return manifest.taxonomy[-1] if manifest.taxonomy else "item_id"


def _read(
    reader: SequenceLogReader, manifest: LogManifest, counted: Mapping[str, str]
) -> dict[str, npt.NDArray[Any]]:
    """Names, labels and counts of all candidates; without what the log lacks."""
    single = {name: info for name, info in manifest.features.items() if not info.multi}
    wanted = {
        name: single[name].rows
        for name in {"item_id", *counted.values()}
        if name in single and single[name].of_candidates
    }
    labels = replace(reader.columns.labels, weights=())
    columns = replace(Columns.of(manifest, wanted), labels=labels, numeric=(), weighted=False)
    parts: list[dict[str, npt.NDArray[Any]]] = []
    for place in reader.row_groups:
        rows = read_rows(place.file, place.row_group, columns)
        requests = np.repeat(np.arange(rows.request_id.size), np.diff(rows.candidate_offsets))
        users = np.repeat(rows.user_id, np.diff(rows.request_offsets))
        part: dict[str, npt.NDArray[Any]] = {
            "user_id": users[requests],
            "request_id": rows.request_id[requests],
            "candidate": np.arange(requests.size) - rows.candidate_offsets[requests],
            "label": rows.labels,
        }
        if "item_id" in wanted:
            part["item_id"] = rows.candidates["item_id"].values
        for name, feature in counted.items():
            if feature in wanted and single[feature].of_behaviors:
                part[name] = past_counts(rows, feature, reader.config.ingestion_delay)
        if reader.sample is not None:
            kept = reader.sample.holds(part["user_id"])
            part = {name: values[kept] for name, values in part.items()}
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def item_counts(log: Path) -> Floats:
    """Occurrences of every item id before the validation period, from the log's vocabulary."""
    file = log / "vocab" / "item_id.parquet"
    try:
        table = pq.read_table(file, columns=["id", "count"])
    except (FileNotFoundError, pa.ArrowException) as error:
        raise DataError(f"the popularity baseline needs the log's vocabulary: {error}", file=file) from None
    ids, counts = table.column("id").to_numpy(), table.column("count").to_numpy()
    dense = np.zeros(int(ids.max(initial=0)) + 1)
    dense[ids] = counts
    return dense


def past_counts(rows: UserRows, feature: str, delay: int) -> Floats:
    """How often each candidate's id of `feature` is among the behaviors that its request sees."""
    behavior, candidate = rows.history[feature].values, rows.candidates[feature].values
    if not behavior.size or not candidate.size:
        return np.zeros(candidate.size)
    ends = with_windows(rows, 0, delay).requests[4]
    requests = np.repeat(np.arange(ends.size), np.diff(rows.candidate_offsets))
    row = np.repeat(np.arange(rows.user_id.size), np.diff(rows.request_offsets))[requests]
    # One number for each pair of row and id; positions of equal pairs ascend.
    rows_of_ids = int(max(behavior.max(), candidate.max())) + 1
    lengths = np.diff(rows.history_offsets)
    pairs, of_behavior = np.unique(
        np.repeat(np.arange(lengths.size), lengths) * rows_of_ids + behavior, return_inverse=True
    )
    wanted = row * rows_of_ids + candidate
    at = np.searchsorted(pairs, wanted).clip(max=pairs.size - 1)
    step = behavior.size + 1
    places = np.sort(of_behavior * step + np.arange(behavior.size))
    first = np.searchsorted(places, at * step)
    count = np.searchsorted(places, at * step + ends[requests]) - first
    return np.where(pairs[at] == wanted, count, 0).astype(np.float64)


@dataclass(frozen=True)
class LabelRates:
    """Mean labels of T tasks, for n candidates of another split.

    Attributes:
        overall: [T], NaN where training has no label of a task; by_user, by_item: [n, T], drawn towards
            `overall` (by_item is that where a log has no items).
        positives: [n, T], the labels of the candidate's user, summed.
    """

    overall: Floats
    by_user: Floats
    by_item: Floats
    positives: Floats

    @property
    def by_both(self) -> Floats:
        """What user and item each add to the log-odds of the mean, together, as a probability."""
        odds = _log_odds(self.by_user) + _log_odds(self.by_item) - _log_odds(self.overall)
        rates: Floats = 1 / (1 + np.exp(-odds))
        return rates


def label_rates(
    config: DataConfig, manifest: LogManifest, labels: TaskLabels, users: Ints, items: Ints | None
) -> LabelRates:
    """Rates of the training split for candidates of these users and items; one pass over it.

    Memory follows the candidates asked for, whatever the size of the training split.

    Args:
        labels: of the tasks; users: [n]; items: [n] ids, None where candidates have none.

    Raises:
        DataError: the training split is empty, missing or malformed.
    """
    tasks = len(labels.tasks)
    of_users, of_items = _Sums(users, tasks), None if items is None else _Sums(items, tasks)
    total, count, candidates = np.zeros(tasks), np.zeros(tasks), 0
    read = {f"label_{name}": name for name in labels.labels}
    names = ["user_id", "num_candidates", *([] if items is None else ["candidate_item_id"]), *read]
    for place in check_files(config.log, manifest, "train", None):
        try:
            group = read_group(place.file, place.row_group, names, None)
            user = np.repeat(group.ints("user_id"), group.ints("num_candidates"))
            found = {
                label: group.labels(_of_candidates(group, name, user.size), name, label in labels.partial)
                for name, label in read.items()
            }
            label = labels.of_tasks(found, user.size)
            item = None
            if items is not None:
                name = "candidate_item_id"
                item = group.flat(_of_candidates(group, name, user.size), name, np.int64)
        except DataError:
            # Training left it out too, and named it.
            if config.on_bad != "skip":
                raise
            continue
        total += np.nansum(label, axis=0, dtype=np.float64)
        count += (~np.isnan(label)).sum(axis=0)
        candidates += label.shape[0]
        of_users.add(user, label)
        if of_items is not None and item is not None:
            of_items.add(item, label)
    if not candidates:
        raise DataError("the training split has no candidates", file=config.log)
    overall = np.divide(total, count, out=np.full(tasks, np.nan), where=count > 0)
    by_user = of_users.rates(overall)
    by_item = np.broadcast_to(overall, by_user.shape) if of_items is None else of_items.rates(overall)
    return LabelRates(overall, by_user, by_item, of_users.labels[of_users.place])


def _log_odds(rate: Floats) -> Floats:
    """Finite for a label that training never saw, or saw always."""
    p = np.clip(rate, 1e-7, 1 - 1e-7)
    odds: Floats = np.log(p) - np.log1p(-p)
    return odds


class _Sums:
    """Labels summed by key and task, of the wanted keys; a label that is NaN was not observed."""

    def __init__(self, wanted: Ints, tasks: int) -> None:
        self.keys, self.place = np.unique(wanted, return_inverse=True)
        self.labels, self.counts = np.zeros((self.keys.size, tasks)), np.zeros((self.keys.size, tasks))

    def add(self, keys: Ints, labels: npt.NDArray[np.float32]) -> None:
        if not self.keys.size:
            return
        at = np.searchsorted(self.keys, keys).clip(max=self.keys.size - 1)
        known = self.keys[at] == keys
        at, labels = at[known], labels[known]
        observed, size = ~np.isnan(labels), self.keys.size
        for task in range(labels.shape[1]):
            self.labels[:, task] += np.bincount(at, np.nan_to_num(labels[:, task]), size)
            self.counts[:, task] += np.bincount(at, observed[:, task], size)

    def rates(self, overall: Floats) -> Floats:
        """[wanted, tasks], smoothed."""
        smoothed: Floats = (self.labels + STRENGTH * overall) / (self.counts + STRENGTH)
        return smoothed[self.place]


def _of_candidates(group: GroupColumns, name: str, count: int) -> pa.Array:
    """A column of candidates, flattened."""
    _, requests = group.lists(name)
    _, values = group.unnest(requests, name)
    if len(values) != count:
        raise group.fail(f"has {len(values)} values for {count} candidates", name)
    return values
