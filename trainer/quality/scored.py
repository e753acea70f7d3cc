"""Candidates with their scores, in memory or in files: metrics, slices, the Parquet file that keeps them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
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
Key = Callable[["Scored"], Ints]
KEYS = ("user_id", "request_id", "candidate", "item_id", "history")
# Parts of candidates that are None where a run or a log has none.
_OPTIONAL = ("domain", "weight")
# In the metadata of a file of scores that are those of a sample.
SAMPLED = "sampled"
# Rows of a row group of a file of scores.
_ROW_GROUP = 1 << 20
HISTORY_EDGES = (0, 1, 10, 50, 200, 1000, 5000)


_NOTHING = measure([], [], np.zeros(0, dtype=np.int64))


class Scores(ABC):
    """Scores of the candidates of a split, wherever they are.

    Attributes:
        tasks: names of the T tasks.
    """

    tasks: tuple[str, ...]

    @property
    @abstractmethod
    def size(self) -> int:
        """The number of candidates."""

    @abstractmethod
    def chunks(self) -> Iterator[Scored]:
        """All candidates by user, request and place in the request; each chunk holds whole users."""

    @abstractmethod
    def metrics_by(self, key: Key, tasks: Sequence[int]) -> dict[int, dict[str, Metrics]]:
        """Metrics of parts of the candidates: key -> task -> metrics, by ascending key.

        Args:
            key: the part that each of some candidates belongs to, [n]; tasks: their numbers.
        """

    def metrics(self, task: int = 0) -> Metrics:
        """Metrics of one task."""
        return self._whole([task])[self.tasks[task]]

    def all_metrics(self) -> dict[str, Metrics]:
        """Metrics of every task, by its name."""
        return self._whole(range(len(self.tasks)))

    def _whole(self, tasks: Sequence[int]) -> dict[str, Metrics]:
        found = self.metrics_by(lambda part: np.zeros(part.candidate.size, dtype=np.int64), tasks)
        # Of nothing there are empty metrics.
        return found.get(0) or {self.tasks[task]: _NOTHING for task in tasks}

    def by_history(self, edges: Sequence[int] = HISTORY_EDGES, task: int = 0) -> dict[str, Metrics]:
        """Metrics of slices by the length of the history, [edge, next edge); empty slices are left out."""

        def slice_of(part: Scored) -> Ints:
            return np.searchsorted(edges, part.history, side="right") - 1

        slices = {}
        for place, found in self.metrics_by(slice_of, [task]).items():
            if place < 0:
                continue
            low, high = edges[place], edges[place + 1] if place + 1 < len(edges) else None
            last = "or more" if high is None else f"to {high - 1:,}"
            name = f"{low:,}" if high == low + 1 else f"{low:,} {last}"
            slices[name] = found[self.tasks[task]]
        return slices

    def sizes_by(self, key: Key) -> dict[int, tuple[int, int]]:
        """Key -> (candidates, users), by ascending key."""
        sizes: dict[int, tuple[int, int]] = {}
        for chunk in self.chunks():
            keys = key(chunk)
            for each in np.unique(keys).tolist():
                part = chunk.part(keys == each)
                candidates, users = sizes.get(each, (0, 0))
                sizes[each] = candidates + part.size, users + part.users
        return dict(sorted(sizes.items()))

    def counts(self) -> tuple[int, int]:
        """-> (requests, users)."""
        found = [(chunk.requests, chunk.users) for chunk in self.chunks()]
        return sum(requests for requests, _ in found), sum(users for _, users in found)


@dataclass(frozen=True)
class Scored(Scores):
    """Candidates with their scores.

    Attributes:
        score, label: float32 [n, T], probabilities and labels; a label that is NaN was not observed, and its
            candidate has no part in that task's metrics.
        user_id, request_id, candidate: int64 [n]; `candidate` counts within its request.
        item_id: int64 [n], the candidate's id in the log's vocabulary; -1 where the log has no such feature.
        history: int64 [n], behaviors that the request saw, at most L.
        tasks: names of the T tasks; numbers where nothing is known of them.
        domain: int64 [n], the candidate's id of `data.domain`; None where the run has no domains.
        weight: float32 [n, T], of the candidate in the loss of each task; None where the log has no weights.
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
    weight: Floats | None = None

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

    @property
    def size(self) -> int:
        return self.candidate.size

    def chunks(self) -> Iterator[Scored]:
        yield self

    def metrics_by(self, key: Key, tasks: Sequence[int]) -> dict[int, dict[str, Metrics]]:
        keys = key(self)
        order = np.argsort(keys, kind="stable")
        each, starts = np.unique(keys[order], return_index=True)
        parts = map(self.part, np.split(order, starts[1:])) if each.size > 1 else [self][: each.size]
        return {
            number: {self.tasks[task]: part.measured(task) for task in tasks}
            for number, part in zip(each.tolist(), parts, strict=True)
        }

    def measured(self, task: int) -> Metrics:
        """Metrics of one task, in memory."""
        part = self.observed(task)
        groups, users = group_keys(part.user_id, part.request_id), group_keys(part.user_id)
        weight = None if part.weight is None else part.weight[:, task]
        return measure(part.score[:, task], part.label[:, task], groups, users, weight)

    def in_order(self) -> Scored:
        """The same candidates by user, request and place in the request: sums over them round alike."""
        return self.part(np.lexsort((self.candidate, self.request_id, self.user_id)))

    def part(self, chosen: npt.NDArray[np.bool_] | Ints) -> Scored:
        """Only the chosen candidates, by a mask or by their places."""
        names = ["score", "label", *KEYS, *(name for name in _OPTIONAL if getattr(self, name) is not None)]
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})


def columns_of(scored: Scored) -> dict[str, npt.NDArray[Any]]:
    """The columns of a file of scores."""
    columns: dict[str, npt.NDArray[Any]] = {name: getattr(scored, name) for name in KEYS}
    if scored.domain is not None:
        columns["domain"] = scored.domain
    for place, task in enumerate(scored.tasks):
        columns[f"score_{task}"] = scored.score[:, place]
        columns[f"label_{task}"] = scored.label[:, place]
    # Behind all else, where the files of earlier versions end.
    for place, task in enumerate(scored.tasks if scored.weight is not None else ()):
        assert scored.weight is not None
        columns[f"weight_{task}"] = scored.weight[:, place]
    return columns


def scored_of(columns: Mapping[str, npt.NDArray[Any]]) -> Scored:
    """The opposite of `columns_of`.

    Raises:
        KeyError: a column is missing.
    """
    tasks = tasks_of(columns)
    weighted = all(f"weight_{task}" in columns for task in tasks)
    kinds = ["score", "label", *(["weight"] if weighted else [])]
    score, label, *weight = (
        np.stack([columns[f"{kind}_{task}"] for task in tasks], axis=1) for kind in kinds
    )
    user, request, candidate, item, history = (columns[name] for name in KEYS)
    return Scored(
        score, label, user, request, candidate, item, history, tasks, columns.get("domain"), *weight
    )


def tasks_of(names: Iterable[str]) -> tuple[str, ...]:
    """The tasks that a file with these columns has scores of.

    Raises:
        KeyError: there are none.
    """
    tasks = tuple(name.removeprefix("score_") for name in names if name.startswith("score_"))
    if not tasks:
        raise KeyError("no column is called score_<task>")
    return tasks


Names = Callable[[Scored], Mapping[str, pa.Array]]
"""Further columns of some candidates, which come first of all."""


def write_scores(
    chunks: Scored | Iterable[Scored],
    path: Path,
    names: Names | None = None,
    sampled: tuple[int, int] | None = None,
) -> None:
    """One Parquet row a candidate: its numbers, and `score_<task>` and `label_<task>` of every task.

    A label that was not observed is NaN. A column `domain` is there where candidates have domains, and
    `weight_<task>` where the log has sample weights.

    Args:
        sampled: (candidates, those of the split) where these are a sample of a split; the file says so.
    """
    facts = None if sampled is None else {SAMPLED: "{} of {}".format(*sampled)}
    waiting: list[pa.Table] = []
    with replacing(path) as part, ExitStack() as opened:
        writer: pq.ParquetWriter | None = None
        for chunk in [chunks] if isinstance(chunks, Scored) else chunks:
            table = pa.table({**(names(chunk) if names else {}), **columns_of(chunk)}, metadata=facts)
            if writer is None:
                writer = opened.enter_context(
                    pq.ParquetWriter(part, table.schema, compression="zstd", write_page_checksum=True)
                )
            waiting.append(table)
            if sum(each.num_rows for each in waiting) >= _ROW_GROUP:
                writer.write_table(pa.concat_tables(waiting))
                waiting.clear()
        if writer is not None and waiting:
            writer.write_table(pa.concat_tables(waiting))


def read_scores(path: Path) -> Scored:
    """What `write_scores` wrote; files of earlier versions too, whose tasks are numbers.

    Raises:
        DataError: missing or not such a file.
    """
    try:
        table = pq.read_table(parquet_source(path), page_checksum_verification=True)
        return scored_of({name: table.column(name).to_numpy() for name in numbers_of(table.column_names)})
    except (OSError, pa.ArrowException, KeyError) as error:
        raise DataError(f"holds no scores of `tandemrec evaluate`: {error}", file=path) from None


def numbers_of(names: Iterable[str]) -> list[str]:
    """The columns that `scored_of` takes."""
    kinds = ("score_", "label_", "weight_")
    return [name for name in names if name in (*KEYS, "domain") or name.startswith(kinds)]


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))
