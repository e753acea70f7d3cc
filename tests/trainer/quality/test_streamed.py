"""Metrics of candidates that pass by, against those of candidates in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trainer.quality.streamed as module
from trainer.quality.leads import estimates
from trainer.quality.metrics import calibration_metrics, measure
from trainer.quality.ranking import ranking_metrics
from trainer.quality.streamed import Part, assess


def same(found: Any, expected: Any) -> bool:
    nan = isinstance(expected, float) and math.isnan(expected)
    return math.isnan(found) if nan else found == pytest.approx(expected, rel=1e-12, abs=1e-12)


def drawn(seed: int, scores: str, labels: str) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    users = np.repeat(np.arange(rng.integers(1, 30)), 3)[: rng.integers(1, 80)]
    user = np.repeat(users, rng.integers(1, 5, users.size))
    request = np.concatenate([np.sort(rng.integers(0, 4, int((user == u).sum()))) for u in np.unique(user)])
    score = rng.uniform(size=user.size)
    if scores == "ties":
        score = (score * 4).round() / 4
    elif scores == "constant":
        score = np.full(user.size, 0.25)
    elif scores == "counts":
        score = rng.integers(-3, 2**40, user.size).astype(np.float64)
    elif scores == "float32":
        score = score.astype(np.float32)
    label = (rng.uniform(size=user.size) < rng.choice([0, 0.3, 1])).astype(np.float32)
    if labels == "probabilities":
        label = rng.uniform(size=user.size).astype(np.float32)
    return score, label, user, request


def pieces(score: Any, label: Any, user: Any, request: Any, cuts: int, weight: Any = None) -> Iterator[Part]:
    """Parts of whole users."""
    for numbers in np.array_split(np.unique(user), cuts):
        kept = np.isin(user, numbers)
        if kept.any():
            own, group = user[kept], user[kept] * 10 + request[kept]
            of_kept = None if weight is None else weight[kept]
            yield Part(score[kept], label[kept], group, np.unique(own, return_inverse=True)[1], of_kept)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    scores=st.sampled_from(["any", "float32", "ties", "constant", "counts"]),
    labels=st.sampled_from(["classes", "probabilities"]),
    cuts=st.integers(1, 6),
    bucket=st.integers(1, 40),
    weighted=st.booleans(),
)
def test_metrics_and_errors_are_those_of_candidates_in_memory(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    scores: str,
    labels: str,
    cuts: int,
    bucket: int,
    weighted: bool,
) -> None:
    score, label, user, request = drawn(seed, scores, labels)
    weight = np.random.default_rng(seed).integers(0, 3, score.size) / np.float32(2) if weighted else None
    probable, group = scores != "counts", user * 10 + request
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BUCKET", bucket)
        scratch = tmp_path_factory.mktemp("scratch")
        found = assess(lambda: pieces(score, label, user, request, cuts, weight), probable, scratch)
    assert not list(scratch.iterdir())
    numbered = np.unique(user, return_inverse=True)[1]
    expected: dict[str, Any] = dict(ranking_metrics(score, label, group, user))
    if probable:
        expected |= calibration_metrics(score, label, user)
        whole = measure(score, label, group, user, weight).as_dict()
        assert ("pcoc_weighted" in whole) == weighted
        if weighted and (weight * label).any():
            assert same(whole["pcoc_weighted"], (weight * score).sum() / (weight * label).sum())
        if weighted:
            expected["pcoc_weighted"] = whole["pcoc_weighted"]
        of_found = found.metrics().as_dict()
        assert of_found.keys() == whole.keys()
        assert all(same(of_found[name], value) for name, value in whole.items())
    values = {**found.ranking, **found.calibration}
    assert values.keys() == expected.keys()
    assert [name for name, value in expected.items() if not same(values[name], value)] == []
    for name, (value, of_users) in estimates(score, label, group, numbered, probable).items():
        mine = found.estimates()[name]
        assert same(mine[0], value)
        if not math.isnan(value):
            np.testing.assert_allclose(mine[1], of_users, rtol=1e-9, atol=1e-13)


def test_nothing_has_no_metrics(tmp_path: Path) -> None:
    found = assess(lambda: iter(()), True, tmp_path).metrics()
    assert found.samples == found.users == 0 and math.isnan(found.auc) and math.isnan(found.logloss)


def test_any_number_of_buckets_needs_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10^10 candidates have 2,400 buckets, more than a process may have files open."""
    monkeypatch.setattr(module, "_BUCKET", 1)
    rng, opened, there = np.random.default_rng(0), [], []
    score, label = rng.uniform(size=400), (rng.uniform(size=400) < 0.5).astype(np.float32)

    def parts() -> Iterator[Part]:
        for start in range(0, 400, 100):
            part, group = slice(start, start + 100), np.repeat(np.arange(20), 5)
            yield Part(score[part], label[part], group + start, group)
            opened.append(len(list(Path("/proc/self/fd").iterdir())))
            there.append(len(list(tmp_path.iterdir())))

    before = len(list(Path("/proc/self/fd").iterdir()))
    found = assess(parts, True, tmp_path).metrics()
    user = np.arange(400) // 5
    assert same(found.auc, measure(score, label, user, user).auc)
    assert max(there) > 100 and max(opened) <= before + 2 and not list(tmp_path.iterdir())
