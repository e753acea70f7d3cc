"""Slices of scores by history length: a partition, each measured on its own."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.quality.scored import HISTORY_EDGES, Scored


def drawn(count: int) -> Scored:
    rng = np.random.default_rng(0)
    request = np.sort(rng.integers(0, count // 5, count))
    history = rng.integers(0, 8, count // 5)[request] ** 4
    score = rng.uniform(0.05, 0.95, (count, 1)).astype(np.float32)
    label = (rng.uniform(size=(count, 1)) < score).astype(np.float32)
    return Scored(score, label, request % 7, request, np.arange(count), np.arange(count), history)


def test_slices_are_a_partition_with_metrics_of_their_own() -> None:
    scored = drawn(2000)
    slices = scored.by_history()
    assert sum(part.samples for part in slices.values()) == 2000 and len(slices) == len(HISTORY_EDGES) - 1
    inside = (scored.history >= 50) & (scored.history < 200)
    assert slices["50 to 199"] == scored.part(inside).metrics()
    assert slices["0"].samples == (scored.history == 0).sum() and "5,000 or more" not in slices
    whole = sum(part.logloss * part.samples for part in slices.values()) / 2000
    assert whole == pytest.approx(scored.metrics().logloss)


def test_edges_may_be_given() -> None:
    slices = drawn(500).by_history((0, 100))
    assert list(slices) == ["0 to 99", "100 or more"]
