"""Candidates with their scores: metrics, slices, and the Parquet file that keeps them."""

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
from trainer.quality.metrics import Metrics, group_keys, measure
from trainer.sealed_folder import replacing
from trainer.storage.ranges import parquet_source

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
KEYS = ("user_id", "request_id", "candidate", "item_id", "history")
HISTORY_EDGES = (0, 1, 10, 50, 200, 1000, 5000)


@dataclass(frozen=True)
class Scored:
    """Candidates with their scores.

    Attributes:
        score, label: float32 [n, T], probabilities and labels; a label that is NaN was not observed, and its
            candidate has no part in that task's metrics.
        user_id, request_id, candidate: int64 [n]; `candidate` counts within its request.
        item_id: int64 [n], the candidate's id in the log's vocabulary; -1 where the log has no such feature.
        history: int64 [n], behaviors that the request saw, at most L.
        tasks: names of the T tasks; numbers where nothing is known of them.
        domain: int64 [n], the candidate's id of `data.domain`; None where the run has no domains.
    """

    score: Floats
    label: Floats
    user_id: Ints
    request_id: Ints
    candidate: Ints
    item_id: Ints
    history: Ints
    tasks: tuple[str, ...] = ()
    domain: Ints | None = None

    def __post_init__(self) -> None:
        if not self.tasks:
            object.__setattr__(self, "tasks", _numbered(self.score.shape[1]))

    @property
    def requests(self) -> int:
        return int(group_keys(self.user_id, self.request_id).max(initial=-1)) + 1

    @property
    def users(self) -> int:
        return int(group_keys(self.user_id).max(initial=-1)) + 1

    def observed(self, task: int) -> Scored:
        """Only the candidates that have a label of a task."""
        missing = np.isnan(self.label[:, task])
        return self.part(~missing) if missing.any() else self

    def metrics(self, task: int = 0) -> Metrics:
        """Metrics of one task."""
        part = self.observed(task)
        groups, users = group_keys(part.user_id, part.request_id), group_keys(part.user_id)
        return measure(part.score[:, task], part.label[:, task], groups, users)

    def all_metrics(self) -> dict[str, Metrics]:
        """Metrics of every task, by its name."""
        return {name: self.metrics(task) for task, name in enumerate(self.tasks)}

    def by_history(self, edges: Sequence[int] = HISTORY_EDGES, task: int = 0) -> dict[str, Metrics]:
        """Metrics of slices by the length of the history, [edge, next edge); empty slices are left out."""
        slices = {}
        for low, high in zip(edges, [*edges[1:], None], strict=True):
            inside = (self.history >= low) & (self.history < high if high is not None else True)
            if inside.any():
                last = "or more" if high is None else f"to {high - 1:,}"
                name = f"{low:,}" if high == low + 1 else f"{low:,} {last}"
                slices[name] = self.part(inside).metrics(task)
        return slices

    def in_order(self) -> Scored:
        """The same candidates by user, request and place in the request: sums over them round alike."""
        return self.part(np.lexsort((self.candidate, self.request_id, self.user_id)))

    def part(self, chosen: npt.NDArray[np.bool_] | Ints) -> Scored:
        """Only the chosen candidates, by a mask or by their places."""
        parts = {name: getattr(self, name)[chosen] for name in ("score", "label", *KEYS)}
        return replace(self, **parts, domain=None if self.domain is None else self.domain[chosen])


def write_scores(scored: Scored, path: Path, names: Mapping[str, pa.Array] | None = None) -> None:
    """One Parquet row a candidate: its numbers, and `score_<task>` and `label_<task>` of every task.

    A label that was not observed is NaN. A column `domain` is there where candidates have domains.

    Args:
        names: further columns, first of all.
    """
    columns: dict[str, Any] = {**(names or {}), **{name: getattr(scored, name) for name in KEYS}}
    if scored.domain is not None:
        columns["domain"] = scored.domain
    for place, task in enumerate(scored.tasks):
        columns[f"score_{task}"] = scored.score[:, place]
        columns[f"label_{task}"] = scored.label[:, place]
    with replacing(path) as part:
        pq.write_table(pa.table(columns), part, compression="zstd", write_page_checksum=True)


def read_scores(path: Path) -> Scored:
    """What `write_scores` wrote; files of earlier versions too, whose tasks are numbers.

    Raises:
        DataError: missing or not such a file.
    """
    what = "holds no scores of `tandemrec evaluate`"
    try:
        table = pq.read_table(parquet_source(path), page_checksum_verification=True)
        tasks = [name.removeprefix("score_") for name in table.column_names if name.startswith("score_")]
        score = [table.column(f"score_{task}").to_numpy() for task in tasks]
        label = [table.column(f"label_{task}").to_numpy() for task in tasks]
        keys = [table.column(name).to_numpy() for name in KEYS]
        domain = table.column("domain").to_numpy() if "domain" in table.column_names else None
    except (OSError, pa.ArrowException, KeyError) as error:
        raise DataError(f"{what}: {error}", file=path) from None
    if not tasks:
        raise DataError(f"{what}: no column is called score_<task>", file=path)
    user, request, candidate, item, history = keys
    score_NT, label_NT = np.stack(score, axis=1), np.stack(label, axis=1)
    return Scored(score_NT, label_NT, user, request, candidate, item, history, tuple(tasks), domain)


def compare_scores(some: Scored, all_scores: Scored) -> tuple[float, float]:
    """Find every candidate of `some` in `all_scores`.

    Tasks are compared by name, or by place where one side has numbers only.

    Returns:
        The largest absolute difference (infinite if a candidate is missing), and the share of candidates
        whose scores are bit-equal.

    Raises:
        DataError: the tasks are not the same.
    """
    known_tasks, numbered = all_scores.tasks, _numbered(len(some.tasks))
    if sorted(some.tasks) == sorted(known_tasks):
        score = all_scores.score[:, [known_tasks.index(task) for task in some.tasks]]
    elif len(some.tasks) == len(known_tasks) and numbered in (tuple(some.tasks), tuple(known_tasks)):
        score = all_scores.score
    else:
        names = ", ".join(known_tasks), ", ".join(some.tasks)
        raise DataError(f"scores of {names[0]} cannot be compared with those of {names[1]}")
    if not some.candidate.size or not all_scores.candidate.size:
        return float("inf"), 0.0
    keys = [np.r_[getattr(all_scores, name), getattr(some, name)] for name in KEYS[:3]]
    known, wanted = np.split(group_keys(*keys), [all_scores.candidate.size])
    order = np.argsort(known, kind="stable")
    place = order[np.searchsorted(known[order], wanted).clip(max=order.size - 1)]
    if (known[place] != wanted).any():
        return float("inf"), 0.0
    other = score[place]
    return float(np.abs(some.score - other).max()), float((some.score == other).all(axis=1).mean())


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))
