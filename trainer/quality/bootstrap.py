"""Intervals of metrics by a bootstrap over users.

Users are drawn with replacement, as many as there are, and a user who is drawn twice counts twice with all
of their requests (Efron 1979; the cluster bootstrap of Field and Welsh 2007). Nothing is copied for that: a
replicate is one weight a user. Scores are sorted once, and some replicates at a time are one matrix of
weights, so that a replicate costs one pass over the candidates.

What is drawn follows from the seed and the number of users alone. Two models, or two slices, that are
measured by the same draws may therefore be compared replicate by replicate: the interval of a difference is
that of the paired difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.quality.metrics import candidate_losses
from trainer.quality.ranking import Floats, Ints, Ranked, as_arrays

METRICS = ("auc", "gauc", "logloss", "pcoc")
"""What is resampled, by the names of `trainer.quality.metrics.Metrics`."""
REPLICATES = 1000
# Numbers of a matrix of weights: 32 MiB, of which there are four at a time.
_MOST = 1 << 22
# A replicate of such an interval may have no meaning; of more than half of them nothing can be said.
_LEAST_MEANINGFUL = 0.5


@dataclass(frozen=True)
class UserDraws:
    """How often each of some users is drawn, in each replicate.

    Attributes:
        users: how many there are, numbered from 0; replicates: how many times they are drawn; seed: decides
            the draws, together with the number of users.
    """

    users: int
    replicates: int = REPLICATES
    seed: int = 0

    def times(self, replicate: int) -> Ints:
        """[users], how often each is drawn in one replicate; they add up to the number of users."""
        drawn = np.random.default_rng([self.seed, replicate]).integers(0, max(self.users, 1), self.users)
        times: Ints = np.bincount(drawn, minlength=self.users)
        return times

    def blocks(self, candidates: int) -> Iterator[Floats]:
        """[users, some replicates] each, all replicates in their order.

        Args:
            candidates: that are weighted by a block at a time, which bounds how large it may be.
        """
        size = max(1, _MOST // max(self.users, candidates, 1))
        for first in range(0, self.replicates, size):
            numbers = range(first, min(first + size, self.replicates))
            yield np.stack([self.times(number) for number in numbers], axis=1).astype(np.float64)


@dataclass(frozen=True)
class _Order:
    """The pairs of a positive and a negative, in ascending order of their scores.

    A candidate of label y is a positive of weight y and a negative of weight 1 - y.

    Attributes:
        positives, negatives: the users of each; of_positives, of_negatives: their weights, None where all
            are 1.
        below, up_to: for each positive how many negatives score less, and how many no more.
    """

    positives: Ints
    negatives: Ints
    of_positives: Floats | None
    of_negatives: Floats | None
    below: Ints
    up_to: Ints

    @staticmethod
    def of(scores: Floats, labels: Floats, users: Ints) -> _Order:
        order = np.argsort(scores, kind="stable")
        s, y, user = scores[order], labels[order], users[order]
        positive, negative = np.nonzero(y > 0)[0], np.nonzero(y < 1)[0]
        weights = y[positive], (1 - y)[negative]
        of_positives, of_negatives = (None if (weight == 1).all() else weight for weight in weights)
        below = np.searchsorted(s[negative], s[positive], side="left")
        up_to = np.searchsorted(s[negative], s[positive], side="right")
        return _Order(user[positive], user[negative], of_positives, of_negatives, below, up_to)

    def auc(self, times_UB: Floats) -> Floats:
        """[B], the AUC of each replicate, ties counted half; NaN with one class only."""
        total_NB = np.zeros((self.negatives.size + 1, times_UB.shape[1]))
        np.cumsum(_weighted(times_UB, self.negatives, self.of_negatives), axis=0, out=total_NB[1:])
        weight_PB = _weighted(times_UB, self.positives, self.of_positives)
        beaten_B = np.einsum("pb,pb->b", weight_PB, total_NB[self.below])
        beaten_B += np.einsum("pb,pb->b", weight_PB, total_NB[self.up_to])
        return _ratio(beaten_B / 2, weight_PB.sum(axis=0) * total_NB[-1])


def _weighted(times_UB: Floats, users: Ints, weights: Floats | None) -> Floats:
    found: Floats = times_UB[users]
    return found if weights is None else found * weights[:, None]


def _ratio(above: Floats, below: Floats) -> Floats:
    found = np.full(above.shape, math.nan)
    np.divide(above, below, out=found, where=below > 0)
    return found


@dataclass(frozen=True)
class Resampled:
    """What replicates need to know of some candidates.

    Attributes:
        own: the users that have any, ascending numbers of the draws.
        sums: [6, own users]: AUC of the requests with both classes times their candidates, these candidates,
            losses, candidates, predictions and labels.
        candidates: how many there are.
    """

    own: Ints
    order: _Order
    sums: Floats
    candidates: int

    @staticmethod
    def of(scores: npt.ArrayLike, labels: npt.ArrayLike, groups: Ints, users: Ints) -> Resampled:
        """Of probabilities, as `trainer.quality.metrics.measure` takes them.

        Args:
            users: [n], the number of each candidate's user in the draws.

        Raises:
            DataError: as `measure`.
        """
        s, y = as_arrays(scores, labels, groups, users)
        own, at = np.unique(users, return_inverse=True)
        ranked = Ranked.of(s, y, groups)
        size = np.where(ranked.both, ranked.sizes, 0.0)
        request_user = ranked.of_groups(at)
        sums = [
            np.bincount(request_user, size * np.nan_to_num(ranked.values), own.size),
            np.bincount(request_user, size, own.size),
            *(np.bincount(at, each, own.size) for each in (candidate_losses(s, y), np.ones(y.size), s, y)),
        ]
        return Resampled(own, _Order.of(s, y, at), np.stack(sums), y.size)

    def block(self, times_UB: Floats) -> Floats:
        """[metrics, B], in the order of `METRICS`, of the replicates of a block of the draws."""
        times_OB = times_UB[self.own]
        won, weight, loss, count, predicted, label = self.sums @ times_OB
        ratios = (_ratio(won, weight), _ratio(loss, count), _ratio(predicted, label))
        return np.stack([self.order.auc(times_OB), *ratios])


def replicates(parts: Sequence[Resampled], draws: UserDraws) -> list[dict[str, Floats]]:
    """Of each part and metric the value of every replicate, [B]; NaN where it has no meaning.

    Memory: four matrices of 32 MiB, and 32 bytes a replicate and part.
    """
    largest = max((part.candidates for part in parts), default=0)
    found: list[list[Floats]] = [[] for _ in parts]
    for times_UB in draws.blocks(largest):
        for part, blocks in zip(parts, found, strict=True):
            blocks.append(part.block(times_UB))
    joined = [np.concatenate(blocks, axis=1) for blocks in found]
    return [dict(zip(METRICS, values, strict=True)) for values in joined]


@dataclass(frozen=True)
class Interval:
    """A value with its interval.

    Attributes:
        value: of all users. low, high: of the 95 % interval, the 2.5th and the 97.5th percentile of the
            replicates; NaN where nothing can be said: with fewer than two users, or if more than half of the
            replicates have no meaning.
        left_out: replicates without a meaning, such as an AUC of one class only; they have no part in it.
    """

    value: float
    low: float
    high: float
    left_out: int = 0

    @staticmethod
    def of(value: float, drawn: Floats, users: int) -> Interval:
        """From the replicates of a value that so many users have a part in."""
        known = drawn[~np.isnan(drawn)]
        left_out = drawn.size - known.size
        if math.isnan(value) or users < 2 or known.size <= _LEAST_MEANINGFUL * drawn.size:
            return Interval(value, math.nan, math.nan, left_out)
        low, high = np.percentile(known, [2.5, 97.5])
        return Interval(value, float(low), float(high), left_out)

    @property
    def half(self) -> float:
        """Half of its width."""
        return (self.high - self.low) / 2

    def excludes(self, value: float) -> bool:
        """Whether a value lies outside; never where nothing can be said."""
        return self.low > value or self.high < value


def intervals(values: Mapping[str, float], drawn: Mapping[str, Floats], users: int) -> dict[str, Interval]:
    """Of each metric; `values`: of all users, by the same names."""
    return {name: Interval.of(values[name], of_metric, users) for name, of_metric in drawn.items()}
