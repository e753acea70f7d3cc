"""Metrics against scikit-learn, and on the small and tied groups that simple code gets wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from tests.helpers.metrics import grouped_auc
from trainer.quality.metrics import calibration_error, group_keys, logloss, measure
from trainer.quality.ranking import auc

cases = st.integers(1, 60).flatmap(
    lambda n: st.tuples(
        st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.9]), min_size=n, max_size=n),
        st.lists(st.integers(0, 1), min_size=n, max_size=n),
        st.lists(st.integers(0, 5), min_size=n, max_size=n),
    )
)


@settings(max_examples=150, deadline=None)
@given(cases)
def test_auc_and_gauc_equal_scikit_learn(case: tuple[list[float], list[int], list[int]]) -> None:
    score, label, group = (np.array(part) for part in case)
    sizes, values = [], []
    for g in np.unique(group):
        part = group == g
        if 0 < label[part].sum() < part.sum():
            sizes.append(part.sum())
            values.append(roc_auc_score(label[part], score[part]))
    found, counted = grouped_auc(score, label.astype(float), group)
    assert counted == len(sizes)
    if sizes:
        assert found == pytest.approx(np.average(values, weights=sizes))
    else:
        assert math.isnan(found)
    if 0 < label.sum() < label.size:
        assert auc(score, label.astype(float)) == pytest.approx(roc_auc_score(label, score))


def test_small_groups_are_exact() -> None:
    assert auc(np.array([0.9, 0.1, 0.2]), np.array([1.0, 0.0, 0.0])) == 1.0
    assert auc(np.array([0.9, 0.1]), np.array([1.0, 0.0])) == 1.0
    assert auc(np.full(4, 0.3), np.array([1.0, 0.0, 0.0, 0.0])) == 0.5


def test_logloss_and_calibration() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(0.02, 0.98, 20_000)
    y = (rng.uniform(size=p.size) < p).astype(float)
    assert logloss(p, y) == pytest.approx(log_loss(y, p))
    assert calibration_error(p, y) < 0.02
    assert calibration_error(np.full_like(p, 0.9), y) == pytest.approx(0.9 - y.mean())
    found = measure(p, y, np.arange(p.size) // 10)
    assert found.pcoc == pytest.approx(p.sum() / y.sum())
    rate = y.mean()
    assert found.ne == pytest.approx(log_loss(y, p) / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)))


def test_one_class_gives_nan_not_a_number_out_of_thin_air() -> None:
    found = measure(np.array([0.2, 0.4]), np.zeros(2), np.zeros(2, dtype=np.int64))
    assert math.isnan(found.auc) and math.isnan(found.gauc) and math.isnan(found.pcoc)


def test_group_keys_tell_equal_request_ids_of_two_users_apart() -> None:
    keys = group_keys(np.array([1, 1, 2, 2]), np.array([7, 7, 7, 8]))
    assert keys[0] == keys[1] and len(set(keys.tolist())) == 3
