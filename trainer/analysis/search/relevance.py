"""What a search has learned to find relevant, by category and place, beside what is informative.

DARE's figure of attention accuracy (section 4.4), measured on the model as it is: the score of a behavior is
the one that the model ranks by, with all of its features, scales and time, and not that of its category
table alone. Of each candidate the mean score of its window is taken off, which no softmax sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import spearmanr

from trainer.analysis.search.information import Floats, Ints, Truth
from trainer.analysis.search.ranking import Ranking


@dataclass
class LearnedRelevance:
    """Sums over the behaviors of some categories that candidates of some categories see.

    Attributes:
        categories: [T], of targets and behaviors; bins: [L], of places.
        total: float64 [T, T, bins], sums of centred scores of target category, behavior category and place;
            count: how many they are.
    """

    categories: Ints
    bins: Ints
    total: Floats = field(init=False)
    count: Floats = field(init=False)

    def __post_init__(self) -> None:
        shape = len(self.categories), len(self.categories), int(self.bins[-1]) + 1
        self.total, self.count = np.zeros(shape), np.zeros(shape)

    def add(self, ranking: Ranking) -> None:
        """Count the windows of a batch."""
        if not ranking.target.size:
            return
        rows = max(int(ranking.target.max()), int(ranking.window.max()), int(self.categories.max())) + 1
        number = np.full(rows + 1, -1)
        number[self.categories] = np.arange(len(self.categories))
        # -1 = nothing is the last place, which has no number.
        target, seen = number[ranking.target][:, None], number[ranking.window]
        chosen = (target >= 0) & (seen >= 0)
        real = ranking.window >= 0
        score = np.where(real, ranking.score, 0.0)
        centred = score - (score.sum(axis=1) / real.sum(axis=1))[:, None]
        bins = np.broadcast_to(self.bins[: real.shape[1]], real.shape)
        target = np.broadcast_to(target, real.shape)
        cell = np.ravel_multi_index((target[chosen], seen[chosen], bins[chosen]), self.total.shape)
        size = self.total.size
        self.total += np.bincount(cell, weights=centred[chosen], minlength=size).reshape(self.total.shape)
        self.count += np.bincount(cell, minlength=size).reshape(self.count.shape)

    def mean(self) -> Floats:
        """[T, T, bins], NaN where no behavior was seen."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.total / self.count)

    def over_places(self) -> Floats:
        """[T, T], all places together."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.total.sum(2) / self.count.sum(2))


def frequent(truth: Truth, most: int = 10) -> Ints:
    """The target categories with the most candidates, at most so many; id 0 is no category."""
    shown = truth.shown.copy()
    shown[:1] = 0
    order = np.argsort(-shown, kind="stable")[:most]
    return np.asarray(order[shown[order] > 0])


def truth_of(truth: Truth, categories: Ints) -> Floats:
    """The information of the same cells as `LearnedRelevance`, bits [T, T, bins]."""
    return truth.gain[np.ix_(categories, categories)].astype(np.float64)


def rank_correlations(learned: Floats, information: Floats) -> Floats:
    """Spearman's correlation over the cells of each target category, [T].

    Cells without a behavior do not count; NaN where fewer than three are left, or all are equal.
    """
    return np.array([_spearman(*pair) for pair in zip(learned, information, strict=True)])


def _spearman(learned: Floats, information: Floats) -> float:
    there = ~np.isnan(learned)
    a, b = learned[there], information[there]
    if a.size < 3 or _equal(a) or _equal(b):
        return math.nan
    return float(spearmanr(a, b).statistic)


def _equal(values: Floats) -> bool:
    return bool((values == values[0]).all())


def weighted_places(information: Floats, counts: Iterable[Floats]) -> Floats:
    """[T, T], the information of all places together, each place counted as often as behaviors lie there."""
    count = np.sum(list(counts), axis=0)
    with np.errstate(invalid="ignore"):
        return np.asarray((information * count).sum(2) / count.sum(2))
