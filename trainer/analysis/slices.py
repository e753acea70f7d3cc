"""Metrics of parts of the candidates, with intervals, and of two models on the same candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from trainer.quality.bootstrap import METRICS, Interval, Resampled, UserDraws, intervals, replicates
from trainer.quality.metrics import Metrics, measure
from trainer.quality.ranking import Bools, Floats, Ints
from trainer.quality.scored import HISTORY_EDGES

_DAY = 86_400
AGE_EDGES = (0, 3_600, _DAY, 7 * _DAY, 30 * _DAY, 90 * _DAY, 365 * _DAY)
_AGES = ("up to 1 hour", "1 hour to 1 day", "1 to 7 days", "7 to 30 days", "30 to 90 days", "90 to 365 days")
FREQUENCY_EDGES = (0, 1, 10, 100, 1_000, 10_000, 100_000)


@dataclass(frozen=True)
class TaskCandidates:
    """The candidates of one task that have a label.

    Attributes:
        score, label: [n]; group: [n] the request of each, by whatever integers.
        user: [n], the number of each candidate's user in the draws of the bootstrap.
    """

    score: Floats
    label: Floats
    group: Ints
    user: Ints

    def part(self, chosen: Bools) -> TaskCandidates:
        return replace(self, **{name: getattr(self, name)[chosen] for name in self.__dataclass_fields__})


@dataclass(frozen=True)
class Slicing:
    """A division of candidates into parts.

    Attributes:
        name: for files; title: what it goes by, in words; parts: their names, in order.
        of: [n], the part of each candidate; -1 = of none.
    """

    name: str
    title: str
    parts: tuple[str, ...]
    of: Ints

    def only(self, chosen: Bools) -> Slicing:
        return replace(self, of=self.of[chosen])


@dataclass(frozen=True)
class Measured:
    """Metrics of some candidates.

    Attributes:
        metrics: exact. intervals: of the metrics of `METRICS`; drawn: their replicates, [B] each, which are
            those of the same draws of users for whatever is measured with them.
        users: that have a candidate.
    """

    metrics: Metrics
    intervals: dict[str, Interval]
    drawn: dict[str, Floats]
    users: int


def measured(parts: Sequence[TaskCandidates], draws: UserDraws) -> list[Measured]:
    """Metrics and intervals of some parts, which may overlap."""
    drawn = replicates([Resampled.of(part.score, part.label, part.group, part.user) for part in parts], draws)
    found = []
    for part, own in zip(parts, drawn, strict=True):
        metrics = measure(part.score, part.label, part.group, part.user)
        values, users = {name: getattr(metrics, name) for name in METRICS}, np.unique(part.user).size
        found.append(Measured(metrics, intervals(values, own, users), own, users))
    return found


def by_history(history: Ints) -> Slicing:
    """By how many behaviors the request saw, [n]."""
    return _by_edges("history", "behaviors that the request saw", history, HISTORY_EDGES)


def by_frequency(frequency: Ints, unknown: Bools | None = None) -> Slicing:
    """By how often the item is a candidate of the training split, [n]; none: it is cold.

    Args:
        unknown: [n], candidates whose item has no id of its own. Training may have seen many such, of which
            none need be this one: they are a part by themselves.
    """
    found = _by_edges(
        "frequency", "candidates of the training split with this item", frequency, FREQUENCY_EDGES
    )
    parts, of = ("0 (cold)", *found.parts[1:]), found.of
    if unknown is not None and unknown.any():
        of = np.where(unknown, len(parts), of)
        parts = (*parts, "unknown item")
    return replace(found, parts=parts, of=of)


def by_age(seconds: Floats) -> Slicing:
    """By the age of the newest behavior that the request saw, [n] seconds; NaN = it saw none."""
    place = np.searchsorted(AGE_EDGES, seconds, side="right") - 1
    place = np.where(np.isnan(seconds), len(AGE_EDGES), place.clip(min=0))
    return Slicing("age", "age of the newest behavior", (*_AGES, "more than 365 days", "no behavior"), place)


def by_domain(domain: Ints, names: dict[int, str]) -> Slicing:
    """By the candidate's domain, [n] ids; those with most candidates first."""
    ids, counts = np.unique(domain, return_counts=True)
    ids = ids[np.argsort(-counts, kind="stable")]
    place_of = {number: place for place, number in enumerate(ids.tolist())}
    place = np.array([place_of[number] for number in domain.tolist()], dtype=np.int64)
    return Slicing(
        "domain", "domain", tuple(names.get(number, str(number)) for number in ids.tolist()), place
    )


def _by_edges(name: str, title: str, values: Ints, edges: Sequence[int]) -> Slicing:
    names = []
    for low, high in zip(edges, [*edges[1:], None], strict=True):
        if high is None:
            names.append(f"{low:,} or more")
        else:
            names.append(f"{low:,}" if high == low + 1 else f"{low:,} to {high - 1:,}")
    place = np.searchsorted(edges, values, side="right") - 1
    return Slicing(name, title, tuple(names), place)


def over_runs(metric: str, runs: Sequence[Measured]) -> Interval:
    """The mean of a metric over runs that were measured on the same candidates and draws of users."""
    value, drawn = _mean(metric, runs)
    return Interval.of(value, drawn, max(run.users for run in runs))


def _mean(metric: str, runs: Sequence[Measured]) -> tuple[float, Floats]:
    value = float(np.mean([getattr(run.metrics, metric) for run in runs]))
    return value, np.mean([run.drawn[metric] for run in runs], axis=0)


_BETTER = {"auc": ("AUC", 1), "gauc": ("GAUC", 1), "logloss": ("logloss", -1)}
"""What two models are compared by: in words, and whether more of it is better."""
COMPARED = tuple(_BETTER)


@dataclass(frozen=True)
class Comparison:
    """A metric of one model less that of another, on the same candidates and draws of users.

    Attributes:
        first, second: names of the models; metric: of `COMPARED`; difference: the first less the second.
    """

    first: str
    second: str
    metric: str
    difference: Interval

    @staticmethod
    def of(
        metric: str, first: str, of_first: Sequence[Measured], second: str, of_second: Sequence[Measured]
    ) -> Comparison:
        """Of two configs, each the mean of its runs (seeds); all of the same candidates and draws."""
        (value, drawn), (other, of_other) = (_mean(metric, runs) for runs in (of_first, of_second))
        users = max(run.users for run in (*of_first, *of_second))
        return Comparison(first, second, metric, Interval.of(value - other, drawn - of_other, users))

    @property
    def told(self) -> bool:
        """Whether one of the two is better for certain, as far as the draw of users is concerned."""
        return self.difference.excludes(0)

    def sentence(self) -> str:
        """Which is better and by how much, or that nobody can tell."""
        word, sign = _BETTER[self.metric]
        value, low, high = self.difference.value, self.difference.low, self.difference.high
        if not self.told:
            return (
                f"no difference can be told between {self.first} and {self.second}: "
                f"{word} {value:+.4f} [{low:+.4f}, {high:+.4f}]"
            )
        better, worse = (self.first, self.second) if sign * value > 0 else (self.second, self.first)
        ends = sorted((abs(low), abs(high)))
        return f"{better} is better than {worse} by {abs(value):.4f} [{ends[0]:.4f}, {ends[1]:.4f}] {word}"
