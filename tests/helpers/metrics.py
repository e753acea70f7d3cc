"""Metrics that only tests ask for."""

from __future__ import annotations

import numpy.typing as npt

from trainer.quality.ranking import Ints, Ranked


def grouped_auc(scores: npt.ArrayLike, labels: npt.ArrayLike, groups: Ints) -> tuple[float, int]:
    """-> (mean AUC of groups with both classes, weighted by size; how many such groups)."""
    ranked = Ranked.of(scores, labels, groups)
    return ranked.gauc(), int(ranked.both.sum())
