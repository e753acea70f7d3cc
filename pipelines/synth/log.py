"""What a generator returns: splits of equal-sized user blocks, with the true probability of each candidate.

Shape legend: U users, N behaviors of a user, R requests of a user, M candidates of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from trainer.log.encoders.table import AnyEncoder
from trainer.log.schema import Side
from trainer.quality.metrics import Metrics, group_keys, measure

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.float32]

START: Final = 1_700_000_000  # unix seconds
DAY: Final = 86_400
FUNNEL_END: Final = "ctcvr"  # click-through and conversion, observed of every candidate


@dataclass(frozen=True)
class PlantedSplit:
    """The blocks of one split.

    Attributes:
        user_id: [U].
        history: feature -> ids [U, N], oldest first; history_time: [U, N], unix seconds.
        request_id, request_time, history_end: [U, R]; request r sees history[:, :history_end[r]].
        candidates: feature -> ids [U, R, M].
        probabilities: task -> float64 [U, R, M], P(label = 1 | it is observed).
        labels: task -> float32 [U, R, M], one draw from it; NaN where it was not observed.
        segment: [U], which kind of user each one is, where the law of the labels tells kinds apart.
        numbers: name -> float [U, R, M], numbers that candidates have.
    """

    user_id: Ints
    history: Mapping[str, Ints]
    history_time: Ints
    request_id: Ints
    request_time: Ints
    history_end: Ints
    candidates: Mapping[str, Ints]
    probabilities: Mapping[str, Floats]
    labels: Mapping[str, Labels]
    segment: Ints | None = None
    numbers: Mapping[str, Floats | Labels] = field(default_factory=dict)

    @property
    def probability(self) -> Floats:
        """[U, R, M], of the first task."""
        return next(iter(self.probabilities.values()))

    def rows(self) -> pa.RecordBatch:
        """One row a user, in the columns of `trainer.log.schema.schema_of`."""
        users, requests, shown = self.probability.shape
        columns: dict[str, pa.Array] = {"user_id": pa.array(self.user_id)}
        columns |= {f"history_{name}": nested(ids) for name, ids in self.history.items()}
        columns["history_timestamp"] = nested(self.history_time)
        columns["request_id"] = nested(self.request_id)
        columns["request_timestamp"] = nested(self.request_time)
        columns["request_history_end"] = nested(self.history_end)
        columns["request_num_candidates"] = nested(np.full((users, requests), shown))
        columns |= {f"candidate_{name}": nested(ids) for name, ids in self.candidates.items()}
        columns |= {f"numeric_{name}": nested(numbers) for name, numbers in self.numbers.items()}
        columns |= {f"label_{task}": nested(labels) for task, labels in self.labels.items()}
        sizes = {
            "behaviors": self.history_time.shape[1],
            "requests": requests,
            "candidates": requests * shown,
        }
        columns |= {f"num_{name}": pa.array(np.full(users, size)) for name, size in sizes.items()}
        return pa.RecordBatch.from_pydict(columns)

    def truth(self, split: str) -> pa.Table:
        """One row a candidate: split, user_id, request_id, candidate (its place in the request), probability.

        The keys are those of the scores that `trainer.quality.scored.write_scores` keeps. `probability` is of
        the first task; where there are several, each has its `probability_<task>` too. `segment` is of the
        user, where users have one.
        """
        user, request, place = self._keys()
        columns: dict[str, Any] = {
            "split": pa.array([split] * user.size).cast(pa.string()),
            "user_id": user,
            "request_id": request,
            "candidate": place,
            "probability": self.probability.reshape(-1),
        }
        if len(self.probabilities) > 1:
            columns |= {f"probability_{task}": p.reshape(-1) for task, p in self.probabilities.items()}
        if self.segment is not None:
            segment = np.broadcast_to(self.segment[:, None, None], self.probability.shape)
            columns["segment"] = segment.reshape(-1)
        return pa.table(columns)

    def oracles(self) -> dict[str, Metrics]:
        """What scoring with the true probabilities achieves, for each task, over its observed candidates.

        No model does better but by chance.
        """
        user, request, _ = self._keys()
        metrics = {}
        for task, labels in self.labels.items():
            y = labels.reshape(-1)
            seen = ~np.isnan(y)
            groups, users = group_keys(user[seen], request[seen]), group_keys(user[seen])
            metrics[task] = measure(self.probabilities[task].reshape(-1)[seen], y[seen], groups, users)
        return metrics

    def _keys(self) -> tuple[Ints, Ints, Ints]:
        shape = self.probability.shape
        user = np.broadcast_to(self.user_id[:, None, None], shape)
        request = np.broadcast_to(self.request_id[:, :, None], shape)
        place = np.broadcast_to(np.arange(shape[2]), shape)
        return user.reshape(-1), request.reshape(-1), place.reshape(-1)


@dataclass(frozen=True)
class Behaviors:
    """Behaviors as a candidate sees them, all of shape [..., N] and beside a candidate's own [..., 1].

    Attributes:
        ids: feature -> ids; rank: 1 for the newest; age: seconds before the request.
    """

    ids: Mapping[str, Ints]
    rank: Ints
    age: Ints


# (seed, candidate's ids [..., 1], behaviors) -> [..., N], what each behavior contributes to the logit's sum.
Worth = Callable[[int, Mapping[str, Ints], Behaviors], Floats]
# History: feature -> ids [U, N], oldest first; candidates: feature -> ids [U, M]; ages: seconds before the
# request [U, N], descending.
Draws = tuple[Mapping[str, Ints], Mapping[str, Ints], Ints]


@dataclass(frozen=True)
class PlantedLog:
    """A whole log.

    Attributes:
        features: name -> rows (largest id + 1; id 0 is never used), of behaviors, candidates or both.
        taxonomy: the features that classify items, coarse to fine.
        splits: `train`, `validation`, `test`.
        raw: the features whose ids are any 64-bit integers; these have 1 row.
        encoders: the features that are numbers, of which splits have codes; these have 1 row.
        facts: what else the manifest tells of the log.
        vectors: [items + 1, dim], pre-trained vectors of the items by their ids; None: there are none.
    """

    features: Mapping[str, int]
    taxonomy: tuple[str, ...]
    splits: Mapping[str, PlantedSplit]
    raw: Set[str] = frozenset()
    encoders: Mapping[str, AnyEncoder] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    vectors: Floats | None = None

    @property
    def tasks(self) -> list[str]:
        """The labels that a candidate has, the first one first."""
        return list(self.splits["train"].labels)

    @property
    def partial(self) -> list[str]:
        """The labels that only a part of the candidates has."""
        parts = self.splits.values()
        return [task for task in self.tasks if any(np.isnan(part.labels[task]).any() for part in parts)]

    def side(self, feature: str) -> Side:
        """What carries a feature: behaviors, candidates or both."""
        part = self.splits["train"]
        if feature in part.history:
            return "both" if feature in part.candidates else "history"
        return "candidate"


def nested(values: npt.NDArray[np.generic]) -> pa.Array:
    """An array of d dimensions as an Arrow array of d - 1 times nested lists."""
    array = pa.array(np.ascontiguousarray(values).reshape(-1))
    for axis in range(values.ndim - 1, 0, -1):
        count, size = int(np.prod(values.shape[:axis])), values.shape[axis]
        array = pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * size), array)
    return array


def sigmoid(logit: Floats) -> Floats:
    """1 / (1 + exp(-logit))."""
    return 1 / (1 + np.exp(-logit))


def sums(
    seed: int, shown: Mapping[str, Ints], history: Mapping[str, Ints], age: Ints, worth: Worth
) -> Floats:
    """sum_j worth_j -> [U, M], of candidates [U, M] over whole histories [U, N], oldest first."""
    rank = np.broadcast_to(np.arange(age.shape[1], 0, -1), age.shape)
    seen = Behaviors(history, rank, age)
    places = range(next(iter(shown.values())).shape[1])
    targets = ({name: ids[:, m, None] for name, ids in shown.items()} for m in places)
    return np.stack([worth(seed, target, seen).sum(axis=1) for target in targets], axis=1)


def of_category(target: Mapping[str, Ints], seen: Behaviors, value: float | npt.NDArray[Any]) -> Floats:
    """`value` for behaviors of the candidate's category, else 0."""
    return np.where(seen.ids["category_id"] == target["category_id"], value, 0.0)


def pairs(category: Ints, name: str, other: Ints, others: int) -> dict[str, Ints]:
    """Items that are a category and one of the `others` ids of the feature `name`."""
    return {"item_id": (category - 1) * others + other, "category_id": category, name: other}


def ages(rng: np.random.Generator, shape: tuple[int, ...]) -> Ints:
    """Uniform over 90 days, descending."""
    return -np.sort(-rng.integers(3_600, 90 * DAY, shape), axis=1)


def draw_labels(rng: np.random.Generator, probability: Floats) -> Labels:
    """Bernoulli draws."""
    return (rng.random(probability.shape) < probability).astype(np.float32)


def split_users(users: int) -> dict[str, tuple[int, int]]:
    """Split -> (first user, users): `users` to train on, a sixth more to validate, a third to test."""
    validation, test = max(1, users // 6), max(1, users // 3)
    return {
        "train": (1, users),
        "validation": (1 + users, validation),
        "test": (1 + users + validation, test),
    }


@dataclass(frozen=True)
class OneRequestEach:
    """Generates logs of users with one request each, which sees the whole history.

    Attributes:
        features: as in `PlantedLog`.
        draw: (rng, seed, number of users) -> histories, candidates and ages.
        logit: gives the logits [U, M] of a click, or those of every task by its name; it is handed a function
            that computes sum_j worth_j -> [U, M].
        taxonomy: as in `PlantedLog`.
        funnel: a task is observed where the one before it happened, and `FUNNEL_END` says whether all did.
        segment: histories -> [U], see `PlantedSplit`.
    """

    features: Mapping[str, int]
    draw: Callable[[np.random.Generator, int, int], Draws]
    logit: Callable[[Callable[[Worth], Floats]], Floats | Mapping[str, Floats]]
    taxonomy: tuple[str, ...] = ("category_id",)
    funnel: bool = False
    segment: Callable[[Mapping[str, Ints]], Ints] | None = None

    def __call__(self, seed: int, users: int) -> PlantedLog:
        """The log of a seed with `users` users to train on."""
        rng, splits = np.random.default_rng([seed, 1]), {}
        for split, (first, count) in split_users(users).items():
            history, shown, age = self.draw(rng, seed, count)
            logits = self.logit(partial(sums, seed, shown, history, age))
            by_task = logits if isinstance(logits, Mapping) else {"click": logits}
            probabilities = {task: sigmoid(logit)[:, None, :] for task, logit in by_task.items()}
            request_time = START + 365 * DAY + rng.integers(0, 30 * DAY, (count, 1))
            labels = {task: draw_labels(rng, p) for task, p in probabilities.items()}
            if self.funnel:
                probabilities, labels = _funnel(probabilities, labels)
            splits[split] = PlantedSplit(
                user_id=np.arange(first, first + count),
                history=history,
                history_time=request_time - age,
                request_id=np.ones((count, 1), dtype=np.int64),
                request_time=request_time,
                history_end=np.full((count, 1), age.shape[1]),
                candidates={name: ids[:, None, :] for name, ids in shown.items()},
                probabilities=probabilities,
                labels=labels,
                segment=self.segment(history) if self.segment else None,
            )
        return PlantedLog(self.features, self.taxonomy, splits)


def _funnel(
    probabilities: Mapping[str, Floats], draws: Mapping[str, Labels]
) -> tuple[dict[str, Floats], dict[str, Labels]]:
    """Tasks of which each is only observed where the one before it happened, and the end of the funnel."""
    labels: dict[str, Labels] = {}
    reached = np.ones_like(next(iter(draws.values())))
    for task, drawn in draws.items():
        labels[task] = np.where(reached > 0, drawn, np.nan).astype(np.float32)
        reached = reached * drawn
    through = np.prod(list(probabilities.values()), axis=0)
    return {**probabilities, FUNNEL_END: through}, {**labels, FUNNEL_END: reached}
