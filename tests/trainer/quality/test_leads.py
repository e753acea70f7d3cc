"""Paired differences of metrics: those of the metrics themselves, with what other users would change."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.quality.leads import estimates, leads
from trainer.quality.metrics import measure


def drawn(users: int, seed: int) -> tuple[np.ndarray, ...]:
    """-> (two scores, [n, 2], that share most of their noise, labels, requests, users)."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), 12)
    request = np.arange(user.size) // 4
    truth = 1 / (1 + np.exp(-rng.normal(0, 1, user.size) - rng.normal(-1, 0.5, users)[user]))
    label = (rng.uniform(size=user.size) < truth).astype(float)
    noise = rng.normal(0, 0.1, user.size)
    both = np.stack([truth + noise, truth + noise + rng.normal(0, 0.05, user.size)], axis=1)
    return both.clip(0.01, 0.99), label, request, user


def lead(score: np.ndarray, label: np.ndarray, request: np.ndarray, user: np.ndarray) -> dict[str, float]:
    first, second = (estimates(column, label, request, user, probable=True) for column in score.T)
    return leads(first, second)


def test_leads_are_differences_of_the_metrics_and_turn_with_their_sides() -> None:
    score, label, request, user = drawn(40, 0)
    found, turned = lead(score, label, request, user), lead(score[:, ::-1], label, request, user)
    first, second = (measure(column, label, request, user) for column in score.T)
    for name in ("auc", "gauc", "logloss"):
        expected = getattr(first, name) - getattr(second, name)
        assert found[f"{name}_lead"] == pytest.approx(expected, abs=1e-12) == -turned[f"{name}_lead"]
        assert 0 < found[f"{name}_lead_ci"] == pytest.approx(turned[f"{name}_lead_ci"])
    for name in ("auc", "gauc"):
        unpaired = np.hypot(getattr(first, f"{name}_ci"), getattr(second, f"{name}_ci"))
        assert found[f"{name}_lead_ci"] < 0.7 * unpaired
    same = lead(score[:, [0, 0]], label, request, user)
    assert set(same.values()) == {0.0}


def test_intervals_are_as_wide_as_other_users_scatter() -> None:
    draws = [lead(*drawn(80, seed)) for seed in range(1, 201)]
    for name in ("auc_lead", "gauc_lead", "logloss_lead"):
        scatter = 1.96 * np.std([draw[name] for draw in draws])
        told = np.mean([draw[f"{name}_ci"] for draw in draws])
        assert told == pytest.approx(scatter, rel=0.2), name


def test_labels_of_one_class_have_a_logloss_only() -> None:
    score, label, request, user = drawn(5, 3)
    found = lead(score, np.zeros_like(label), request, user)
    assert np.isnan([found[f"{name}_lead{end}"] for name in ("auc", "gauc") for end in ("", "_ci")]).all()
    assert found["logloss_lead_ci"] > 0
    nothing = np.zeros(0, dtype=np.int64)
    empty = lead(np.zeros((0, 2)), np.zeros(0), nothing, nothing)
    assert np.isnan(list(empty.values())).all()
