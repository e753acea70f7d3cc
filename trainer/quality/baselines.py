"""Baselines that any trained model must beat, from the same log and on the same candidates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from embeddings.errors import DataError
from trainer.data.blocks import with_windows
from trainer.data.reader import SequenceLogReader
from trainer.data.row_group import read_footer
from trainer.data.rows import Columns as RowColumns
from trainer.data.rows import UserRows, read_rows
from trainer.log.arrow import PARQUET_ERRORS
from trainer.log.schema import LogManifest, read_manifest
from trainer.log.vocabulary import batches_of
from trainer.quality.leads import estimates, leads
from trainer.quality.metrics import calibration_metrics, group_keys
from trainer.quality.ranking import Floats, Ints, ranking_metrics
from trainer.quality.rates import RateTable, rate_table
from trainer.quality.runs import ORDER, Columns, joined
from trainer.quality.scored import Scored, Scores
from trainer.storage.ranges import parquet_source

# These are probabilities, the others only an order.
RATES = ("mean_label", "item_rate", "user_item_rate")
COUNTED = ("item_count", "category_count")
# Larger ids than those of any vocabulary are raw.
_DENSE = (1 << 31) - 1


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

    def metrics(self, scored: Scores | None = None) -> dict[str, dict[str, dict[str, Any]]]:
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
            if isinstance(scored, Scored):
                model = estimates(scored.score[observed, task], label, groups, users, probable=True)
            table[name] = {}
            for baseline, of_all in scores.items():
                score, probable = of_all[observed], baseline in RATES
                values: dict[str, Any] = {**ranking_metrics(score, label, groups, users)}
                if probable:
                    values |= calibration_metrics(score, label, users)
                if model is not None:
                    values |= leads(model, estimates(score, label, groups, users, probable))
                table[name][baseline] = values
        return table


def baselines(reader: SequenceLogReader, most: int = 0) -> Baselines:
    """Baselines on the reader's split, whole histories whatever the window.

    Args:
        most: see `Scorer.of`.

    `mean_label`, `item_rate`, `user_item_rate`: of the training split, for each task, see `rate_table`.
    `popularity`: how often the candidate's item occurred before validation.
    `item_count`: how often the user's own visible history holds the very item; `category_count`: the same
    of the finest taxonomy level. These three are no probabilities, and the same for every task.
    """
    read = joined(list(read_candidates(reader)))
    scorer = Scorer.of(reader, np.unique(read["user_id"]), unique_items([read]), most)
    order = np.lexsort((read["candidate"], read["request_id"], read["user_id"]))
    scores = {
        task: {name: values[order] for name, values in found.items()}
        for task, found in scorer.scores(read, reader.columns.tasks).items()
    }
    user, request, candidate = (read[name] for name in ORDER)
    nothing, tasks = np.full(user.size, -1), tuple(reader.columns.tasks)
    label = np.stack([read[f"label_{task}"] for task in tasks], axis=1)
    candidates = Scored(label, label, user, request, candidate, nothing, nothing, tasks)
    positives = scorer.positives(user)
    return Baselines(
        candidates.part(order), scores, scorer.missing, None if positives is None else positives[order]
    )


@dataclass(frozen=True)
class Scorer:
    """What scores candidates without training.

    Attributes:
        tasks: names of the T tasks; popularity: items, ascending, and how often each occurred, None = not
            known; rates: None = not known.
        of_training: the candidates are those that rates are made of.
        missing: what could not be computed, and why.
    """

    tasks: Sequence[str]
    popularity: tuple[Ints, Floats] | None
    rates: RateTable | None
    of_training: bool
    missing: Sequence[str]

    @staticmethod
    def of(reader: SequenceLogReader, users: Ints, items: Ints | None, most: int = 0) -> Scorer:
        """For candidates of these users and items; one pass over the training split.

        Training's files may be gone by the time a model is measured: then nothing else is the worse for it.

        Args:
            most: of a training split with more candidates nothing is read, and there are no rates; 0 = any.
        """
        manifest, tasks, missing = read_manifest(reader.config.log), reader.columns.tasks, []
        popularity = rates = None
        if items is not None and not manifest.features["item_id"].raw:
            try:
                popularity = items, item_counts(reader.config.log, items)
            except DataError as error:
                missing.append(f"item popularity: {error}")
        elif items is not None:
            missing.append("item popularity: the log's ids of items are raw, so that nobody counted them")
        of_training = reader.split == "train"
        try:
            if most and manifest.holds("train") and manifest.splits["train"].candidates > most:
                count = manifest.splits["train"].candidates
                raise DataError(f"training has {count:,} candidates; `tandemrec evaluate` reads them all")
            rates = rate_table(reader.config, manifest, reader.columns.labels, users, items)
        except DataError as error:
            missing.append(f"label rates: {error}")
        else:
            missing += [
                f"label rates of {name}: training has no label of it"
                for name, overall in zip(tasks, rates.overall, strict=True)
                if np.isnan(overall)
            ]
            if of_training:
                why = "training would be measured on the labels they are made of"
                missing.append(f"label rates of items and users: {why}")
        return Scorer(tasks, popularity, rates, of_training, missing)

    def scores(self, read: Columns, tasks: Sequence[str]) -> dict[str, dict[str, Floats]]:
        """Task -> baseline -> score of each candidate that was read, for some tasks."""
        items, found = read.get("item_id"), {}
        rates = None if self.rates is None else self.rates.of(read["user_id"], items)
        # Scores that are the same for every task.
        counts = {name: read[name] for name in COUNTED if name in read}
        if self.popularity is not None and items is not None:
            known, occurred = self.popularity
            counts = {"popularity": occurred[np.searchsorted(known, items)], **counts}
        for name in tasks:
            of_task, task = {}, self.tasks.index(name)
            if rates is not None and not np.isnan(rates.overall[task]):
                of_task["mean_label"] = np.broadcast_to(rates.overall[task], read["user_id"].shape)
                if not self.of_training:
                    if items is not None:
                        of_task["item_rate"] = rates.by_item[:, task]
                    of_task["user_item_rate"] = rates.by_both[:, task]
            found[name] = {**of_task, **counts}
        return found

    def positives(self, users: Ints) -> Floats | None:
        """[n, T], positives of each task that training has of these users; None where that is not known."""
        if self.rates is None or self.of_training:
            return None
        return self.rates.of(users, None).positives


def unique_items(parts: Iterable[Columns]) -> Ints | None:
    """The items of all parts, each once; None where candidates have none."""
    items: Ints | None = None
    for part in parts:
        if "item_id" in part:
            items = np.union1d(np.zeros(0, dtype=np.int64) if items is None else items, part["item_id"])
    return items


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


def read_candidates(reader: SequenceLogReader) -> Iterator[Columns]:
    """Names, labels and counts of all candidates, a row group at a time; without what the log lacks."""
    manifest = read_manifest(reader.config.log)
    counted = {"item_count": "item_id"}
    if manifest.taxonomy:
        counted["category_count"] = counted_feature(manifest)
    single = {name: info for name, info in manifest.features.items() if not info.multi}
    wanted = {
        name: single[name].rows
        for name in {"item_id", *counted.values()}
        if name in single and single[name].of_candidates
    }
    labels = replace(reader.columns.labels, weights=())
    columns = replace(RowColumns.of(manifest, wanted), labels=labels, numeric=(), weighted=False)
    footer = lru_cache(1)(read_footer)
    for place in reader.row_groups:
        rows = read_rows(place.file, place.row_group, columns, footer(place.file))
        requests = np.repeat(np.arange(rows.request_id.size), np.diff(rows.candidate_offsets))
        users = np.repeat(rows.user_id, np.diff(rows.request_offsets))
        part: dict[str, npt.NDArray[Any]] = {
            "user_id": users[requests],
            "request_id": rows.request_id[requests],
            "candidate": np.arange(requests.size) - rows.candidate_offsets[requests],
            **{f"label_{task}": rows.labels[:, at] for at, task in enumerate(reader.columns.tasks)},
        }
        if "item_id" in wanted:
            part["item_id"] = rows.candidates["item_id"].values
        for name, feature in counted.items():
            if feature in wanted and single[feature].of_behaviors:
                part[name] = past_counts(rows, feature, reader.config.ingestion_delay)
        if reader.sample is not None:
            kept = reader.sample.holds(part["user_id"])
            part = {name: values[kept] for name, values in part.items()}
        yield part


def item_counts(log: Path, items: Ints) -> Floats:
    """Occurrences of some items before the validation period, from the log's vocabulary.

    Args:
        items: ids, ascending and each once; those beyond the vocabulary have not occurred.
    """
    file, occurred = log / "vocab" / "item_id.parquet", np.zeros(items.size)
    try:
        with pq.ParquetFile(parquet_source(file)) as parquet:
            for batch in batches_of(parquet, ["id", "count"]) if items.size else ():
                ids, counts = (batch.column(name).to_numpy() for name in ("id", "count"))
                at = np.searchsorted(items, ids).clip(max=items.size - 1)
                known = items[at] == ids
                occurred[at[known]] = counts[known]
    except (*PARQUET_ERRORS, KeyError) as error:
        raise DataError(f"the popularity baseline needs the log's vocabulary: {error}", file=file) from None
    return occurred


def past_counts(rows: UserRows, feature: str, delay: int) -> Floats:
    """How often each candidate's id of `feature` is among the behaviors that its request sees."""
    behavior, candidate = rows.history[feature].values, rows.candidates[feature].values
    if not behavior.size or not candidate.size:
        return np.zeros(candidate.size)
    ends = with_windows(rows, 0, delay).requests[4]
    requests = np.repeat(np.arange(ends.size), np.diff(rows.candidate_offsets))
    row = np.repeat(np.arange(rows.user_id.size), np.diff(rows.request_offsets))[requests]
    if min(behavior.min(), candidate.min()) < 0 or max(behavior.max(), candidate.max()) > _DENSE:
        # Raw ids: smaller numbers in their place, or the pairs below would not fit into 64 bits.
        _, placed = np.unique(np.concatenate([behavior, candidate]), return_inverse=True)
        behavior, candidate = placed[: behavior.size], placed[behavior.size :]
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
