"""Quality of an order: AUC, GAUC, HR and NDCG with ties, and how far they are known.

A label is a probability: a candidate of label y stands for a positive of weight y and a negative of weight
1 - y, so that 0 and 1 are what they always were. docs/evaluation.md has the definitions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embeddings.errors import DataError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

RANKS = (1, 5, 10)  # the k of HR@k and NDCG@k
_NORMAL_95 = 1.959964


def as_arrays(scores: npt.ArrayLike, labels: npt.ArrayLike, *keys: Ints) -> tuple[Floats, Floats]:
    """Scores and labels as float64, one of each and of every key a candidate.

    Raises:
        DataError: their numbers differ, a score is not finite, or a label is no number from 0 to 1.
    """
    s, y = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    shapes = [part.shape for part in (s, y, *map(np.asarray, keys))]
    if len(set(shapes)) > 1 or s.ndim != 1:
        lengths = " and ".join(" x ".join(map(str, shape)) or "single" for shape in shapes)
        raise DataError(f"scores, labels and grouping keys must be one each a candidate, not {lengths}")
    if not np.isfinite(s).all():
        raise DataError(
            f"{int((~np.isfinite(s)).sum())} of {s.size} scores are NaN or infinite; the model "
            "diverged, train again with lower learning rates"
        )
    # NaN fails both comparisons.
    wrong = ~((y >= 0) & (y <= 1))
    if wrong.any():
        raise DataError(
            f"{int(wrong.sum()):,} of {y.size:,} labels lie outside 0 to 1 (the first is {y[wrong][0]:g}); "
            "a label is 0, 1 or a probability: divide or cut it when the log is made"
        )
    return s, y


def auc(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Area under the ROC curve, ties counted half; NaN with one class only."""
    return auc_influence(scores, labels)[0]


def auc_influence(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[float, Floats]:
    """-> (AUC, what each candidate adds to its error [n]).

    The second sums to zero; its sums over independent groups of candidates have the AUC's variance (DeLong's
    structural components; Obuchowski 1997 for clusters). Differences of two AUCs have differences of it.
    """
    s, y = as_arrays(scores, labels)
    positive, negative = float(y.sum()), float((1 - y).sum())
    if not (positive > 0 and negative > 0):
        return math.nan, np.zeros(y.size)
    order = np.argsort(s, kind="stable")
    tied = _Ties.of(s[order], np.zeros(y.size, dtype=np.int64))
    beaten, above = np.empty(y.size), np.empty(y.size)
    beaten[order] = tied.below((1 - y)[order])
    above[order] = positive - tied.below(y[order])
    value = float((y * beaten).sum()) / (positive * negative)
    influence = y * (beaten / negative - value) / positive
    influence += (1 - y) * (above / positive - value) / negative
    return value, influence


def half_width(influence: Floats, clusters: Ints) -> float:
    """Half of the 95 % interval of an estimate, from what each candidate adds to its error.

    Candidates of one cluster may depend on one another; NaN with fewer than two clusters.

    Args:
        clusters: [n], numbered from 0.
    """
    sums = np.bincount(clusters, weights=influence)
    if sums.size < 2:
        return math.nan
    return _NORMAL_95 * math.sqrt(sums.size / (sums.size - 1) * float((sums**2).sum()))


@dataclass(frozen=True)
class _Ties:
    """Where groups and ties begin and end, for values in ascending order within groups."""

    group_starts: Ints
    starts: Ints
    of_group: Ints
    of_tie: Ints

    @staticmethod
    def of(scores: Floats, groups: Ints) -> _Ties:
        new_group = np.r_[True, groups[1:] != groups[:-1]][: scores.size]
        new_tie = new_group | np.r_[True, scores[1:] != scores[:-1]][: scores.size]
        return _Ties(
            np.nonzero(new_group)[0], np.nonzero(new_tie)[0], np.cumsum(new_group) - 1, np.cumsum(new_tie) - 1
        )

    @property
    def sizes(self) -> Ints:
        sizes: Ints = np.diff(np.r_[self.starts, self.of_tie.size])
        return sizes

    def below(self, weight: Floats) -> Floats:
        """[n] weight of what ranks lower in the same group, ties counted half."""
        total = np.r_[0.0, np.cumsum(weight)]
        first, last = total[self.starts], total[self.starts + self.sizes]
        lower: Floats = ((first + last) / 2)[self.of_tie] - total[self.group_starts][self.of_group]
        return lower


@dataclass(frozen=True)
class Ranked:
    """Candidates by group and ascending score.

    Attributes:
        labels: in that order; order: places of the candidates; ties: where groups and ties begin.
        sizes, positives: [groups], candidates and the sum of their labels.
        both: [groups], whether a group holds both classes; no other says anything about an order.
        values: [groups], AUC; NaN where not `both`.
    """

    labels: Floats
    order: Ints
    ties: _Ties
    sizes: Floats
    positives: Floats
    both: Bools
    values: Floats

    @staticmethod
    def of(scores: npt.ArrayLike, labels: npt.ArrayLike, groups: Ints) -> Ranked:
        s, y = as_arrays(scores, labels, groups)
        order = np.lexsort((s, groups))
        y = y[order]
        ties = _Ties.of(s[order], np.asarray(groups)[order])
        if not y.size:
            return Ranked(y, order, ties, y, y, np.zeros(0, dtype=np.bool_), y)
        sizes = np.diff(np.r_[ties.group_starts, y.size]).astype(np.float64)
        positives = np.add.reduceat(y, ties.group_starts)
        negatives = np.add.reduceat(1 - y, ties.group_starts)
        won = np.add.reduceat(y * ties.below(1 - y), ties.group_starts)
        both = (positives > 0) & (negatives > 0)
        values = np.full(sizes.size, math.nan)
        np.divide(won, positives * negatives, out=values, where=both)
        return Ranked(y, order, ties, sizes, positives, both, values)

    def gauc(self) -> float:
        """Mean AUC of the groups with both classes, weighted by their candidates."""
        if not self.both.any():
            return math.nan
        return float(np.average(self.values[self.both], weights=self.sizes[self.both]))

    def gauc_influence(self) -> Floats:
        """[groups], what each adds to the error of `gauc`."""
        weight = np.where(self.both, self.sizes, 0)
        influence: Floats = weight * np.nan_to_num(self.values - self.gauc()) / max(weight.sum(), 1)
        return influence

    def of_groups(self, keys: Ints) -> Ints:
        """[groups] from [n], a key of the candidates that all of a group share."""
        shared: Ints = keys[self.order[self.ties.group_starts]]
        return shared

    def gauc_half_width(self, clusters: Ints) -> float:
        """Half of the 95 % interval of `gauc`; `clusters` of the candidates, in their given order."""
        if not self.both.any():
            return math.nan
        return half_width(self.gauc_influence(), self.of_groups(clusters))

    def at(self, k: int) -> tuple[float, float]:
        """-> (HR@k, NDCG@k): means over the groups with both classes, each of them once."""
        hits, gains = self.gains(k)
        return (float(hits.mean()), float(gains.mean())) if hits.size else (math.nan, math.nan)

    def gains(self, k: int) -> tuple[Floats, Floats]:
        """-> (chance of a hit among the best k, gain over the best possible), of groups with both classes.

        A label of at least 0.5 is a hit. Tied candidates take their places in random order: both are expected
        values over it.
        """
        ties, hits = self.ties, (self.labels >= 0.5).astype(np.int64)
        if not hits.size:
            return np.zeros(0), np.zeros(0)
        total = np.add.reduceat(hits, ties.group_starts)
        counted = (total > 0) & (total < self.sizes)
        if not counted.any():
            return np.zeros(0), np.zeros(0)
        size, inside = ties.sizes, np.add.reduceat(hits, ties.starts)
        group = ties.of_group[ties.starts]
        ends = (ties.group_starts + self.sizes.astype(np.int64))[group]
        better = ends - ties.starts - size  # candidates of the group that rank above the tie
        first_tie = ties.of_tie[ties.group_starts]
        places = np.clip(k - better, 0, size)
        hit = 1 - np.multiply.reduceat(_none_drawn(size, inside, places), first_tie)
        discount = np.r_[0.0, np.cumsum(1 / np.log2(np.arange(k) + 2))]
        gain = inside / size * (discount[np.minimum(better + size, k)] - discount[np.minimum(better, k)])
        gains, best = np.add.reduceat(gain, first_tie), discount[np.minimum(total, k)]
        return hit[counted], gains[counted] / best[counted]


def _none_drawn(size: Ints, hits: Ints, places: Ints) -> Floats:
    """Probability that `places` of `size` candidates, drawn without replacement, hold none of the hits."""
    logs = np.r_[0.0, np.cumsum(np.log(np.arange(1, int(size.max(initial=0)) + 1)))]
    others = size - hits
    enough = others >= places
    left = np.where(enough, others - places, 0)
    chance = np.exp(logs[others] - logs[left] - logs[size] + logs[size - places])
    return np.where(enough, chance, 0.0)


def ranking_metrics(
    scores: npt.ArrayLike, labels: npt.ArrayLike, groups: Ints, users: Ints
) -> Mapping[str, float | int]:
    """Everything that only the order of scores decides, by the names of `trainer.quality.metrics.Metrics`."""
    as_arrays(scores, labels, groups, users)
    users = np.unique(users, return_inverse=True)[1]
    value, influence = auc_influence(scores, labels)
    by_request, by_user = Ranked.of(scores, labels, groups), Ranked.of(scores, labels, users)
    at = {k: by_request.at(k) for k in RANKS}
    return {
        "auc": value,
        "auc_ci": math.nan if math.isnan(value) else half_width(influence, users),
        "gauc": by_request.gauc(),
        "gauc_ci": by_request.gauc_half_width(users),
        "gauc_user": by_user.gauc(),
        **{f"hr_{k}": hit_rate for k, (hit_rate, _) in at.items()},
        **{f"ndcg_{k}": ndcg for k, (_, ndcg) in at.items() if k > 1},
        "groups": int(by_request.both.sum()),
        "users": int(by_user.both.sum()),
    }
