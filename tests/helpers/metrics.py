"""Metrics that only tests ask for, and candidates to measure."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from trainer.quality.ranking import Floats, Ints, Ranked

TIED = [0.1, 0.2, 0.3, 0.5, 0.9]
Case = tuple[Floats, Floats, Ints, Ints]


def cases(labels: list[float]) -> st.SearchStrategy[Case]:
    """Scores with many ties, labels, requests and users; each user has some of the requests."""
    row = st.tuples(st.sampled_from(TIED), st.sampled_from(labels), st.integers(0, 5))

    def arrays(rows: list[tuple[float, float, int]]) -> Case:
        score, label, group = (np.array(part) for part in zip(*rows, strict=True))
        return score, label.astype(float), group, group % 3

    return st.lists(row, min_size=1, max_size=60).map(arrays)


def clustered(rng: np.random.Generator, users: int) -> Case:
    """Users differ in rate and in how well they are understood; two scores of the same labels."""
    user = np.repeat(np.arange(users), rng.integers(1, 20, users))
    taste = rng.normal(0, 1, users)[user] * rng.normal(0.6, 0.6, users)[user]
    label = (rng.normal(size=user.size) + taste > 0.8).astype(float)
    return taste + rng.normal(size=user.size), taste + rng.normal(0, 2, user.size), label, user  # type: ignore[return-value]


def grouped_auc(scores: npt.ArrayLike, labels: npt.ArrayLike, groups: Ints) -> tuple[float, int]:
    """-> (mean AUC of groups with both classes, weighted by size; how many such groups)."""
    ranked = Ranked.of(scores, labels, groups)
    return ranked.gauc(), int(ranked.both.sum())
