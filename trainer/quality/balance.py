"""Metrics by feedback balance: how similar the amounts of positive feedback are that a user gave two tasks.

STEM (arXiv 2308.13537) splits samples by the relative amount of positive feedback among tasks, and claims
that models with shared embeddings lose most where the amounts are comparable. The edges of its groups are
not known to us, so these are ours: a user has n_a and n_b positives of two tasks, and is `comparable` if
neither number is more than twice the other.

Positives are counted in the training split, so that the labels that are measured have no part in where a
user belongs. Where training has none of these users (each user is in one split), they are counted in the
measured split itself, and this is said: AUC, logloss and PCOC of a stratum then depend on the choice, GAUC
hardly does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.config.tasks import Task
from trainer.quality.metrics import Metrics, entry_of, group_keys
from trainer.quality.ranking import Floats, Ints
from trainer.quality.scored import Scored, Scores

FACTOR = 2.0
"""Two numbers of positives are comparable if neither is more than so many times the other."""


@dataclass(frozen=True)
class Stratum:
    """The candidates of the users of one stratum.

    Attributes:
        candidates, users: of the split, whether or not they have labels of the two tasks.
        counted_in: the split whose labels decide.
        metrics: of the two tasks, by name.
    """

    candidates: int
    users: int
    counted_in: str
    metrics: Mapping[str, Metrics]

    def entry(self) -> dict[str, Any]:
        """As files hold it."""
        size = {"candidates": self.candidates, "users": self.users, "counted_in": self.counted_in}
        return {"stratum": size, **entry_of(self.metrics)}


Pair = tuple[str, str]
"""The names of two tasks, in the order of the tasks."""


def strata_of(pair: Pair) -> tuple[str, str, str, str]:
    """The names of the strata of two tasks, by the numbers of `strata`."""
    return "comparable", f"more {pair[0]}", f"more {pair[1]}", "neither"


def strata(first: Floats, second: Floats) -> Ints:
    """The stratum of each user from the numbers of positives of two tasks, [n] each.

    0: neither number is more than `FACTOR` times the other; 1: there are more of the first task; 2: of the
    second; 3: there is none of both.
    """
    more_first, more_second = first > FACTOR * second, second > FACTOR * first
    numbers: Ints = np.select([more_first, more_second, first + second == 0], [1, 2, 3], 0)
    return numbers


Positives = Callable[[Scored], Floats | None]
"""Positives that training has of the users of some candidates, [n, T]; None: it has none of any."""


def by_balance(
    scored: Scores, trained: Floats | Positives | None, split: str, tasks: Sequence[Task] = ()
) -> dict[Pair, dict[str, Stratum]]:
    """Pair of tasks -> stratum -> its metrics: of each pair a partition of the split.

    Strata without a candidate are left out.

    Args:
        trained: positives of each task that training has of the candidate's user, [n, T] or by parts of the
            candidates; None: not known.
        split: its name.
        tasks: the T tasks, to leave out pairs that are `of_one_feedback`; empty: every pair is measured.
    """
    counted_in, positives = "train", _positives(scored, trained)
    if positives is None:
        counted_in, positives = split, _own_positives
    pairs = {}
    for at in itertools.combinations(range(len(scored.tasks)), 2):
        if tasks and of_one_feedback(tasks[at[0]], tasks[at[1]]):
            continue

        def stratum(part: Scored, at: tuple[int, int] = at, of: Positives = positives) -> Ints:
            found = of(part)
            assert found is not None
            return strata(found[:, at[0]], found[:, at[1]])

        pair = scored.tasks[at[0]], scored.tasks[at[1]]
        metrics = scored.metrics_by(stratum, at)
        pairs[pair] = {
            strata_of(pair)[number]: Stratum(candidates, users, counted_in, metrics[number])
            for number, (candidates, users) in scored.sizes_by(stratum).items()
        }
    return pairs


def _positives(scored: Scores, trained: Floats | Positives | None) -> Positives | None:
    """What tells positives of training of any part; None where it has none of these users."""
    if trained is None:
        return None
    if not callable(trained):
        array = trained
        return (lambda _: array) if array.any() else None
    first = next(scored.chunks(), None)
    return trained if first is not None and trained(first) is not None else None


def of_one_feedback(first: Task, second: Task) -> bool:
    """Whether two tasks have the same label, or one is a product and the other a factor of it.

    Then their positives say nothing about how users divide their feedback.
    """
    factor = first.name in second.settings.product or second.name in first.settings.product
    return factor or first.label == second.label


def _own_positives(scored: Scored) -> Floats:
    """[n, T], positives that the split itself has of the candidate's user."""
    users = group_keys(scored.user_id)
    sums = [np.bincount(users, column)[users] for column in np.nan_to_num(scored.label).T]
    return np.stack(sums, axis=1)


def most_comparable(pairs: Mapping[Pair, Mapping[str, Stratum]]) -> Pair:
    """The pair with most candidates of users whose feedback is comparable, the first of several such."""

    def comparable(pair: Pair) -> int:
        stratum = pairs[pair].get("comparable")
        return stratum.candidates if stratum else 0

    return max(pairs, key=comparable)
