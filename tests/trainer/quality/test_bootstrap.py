"""The bootstrap over users against a plain loop that copies users, and against the intervals by influence."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.metrics import cases, clustered
from trainer.quality.bootstrap import METRICS, Interval, Resampled, UserDraws, intervals, replicates
from trainer.quality.metrics import measure
from trainer.quality.ranking import Floats, Ints


def plain_replicate(times: Ints, score: Floats, label: Floats, group: Ints, user: Ints) -> dict[str, float]:
    """Copies every user as often as drawn, as a user and with requests of their own, and measures that."""
    parts, copies = [], 0
    for number, count in enumerate(times.tolist()):
        for _ in range(count):
            own = np.nonzero(user == number)[0]
            parts.append((score[own], label[own], group[own] + 1000 * copies, np.full(own.size, copies)))
            copies += 1
    found = measure(*(np.concatenate(part) for part in zip(*parts, strict=True))).as_dict()
    return {name: found[name] for name in METRICS}


@settings(max_examples=60, deadline=None)
@given(cases([0, 1, 0.25]), st.integers(0, 5), st.booleans())
def test_a_replicate_is_a_measurement_of_the_users_that_were_drawn(
    case: tuple[Floats, Floats, Ints, Ints], seed: int, binary: bool
) -> None:
    score, label, group, user = case
    label = np.round(label) if binary else label
    draws = UserDraws(users=5, replicates=4, seed=seed)  # users 3 and 4 have no candidate
    (found,) = replicates([Resampled.of(score, label, group, user)], draws)
    for number in range(draws.replicates):
        expected = plain_replicate(draws.times(number), score, label, group, user)
        for name in METRICS:
            assert found[name][number] == pytest.approx(expected[name], nan_ok=True, abs=1e-12), name


def test_all_parts_have_the_same_draws_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, label, user = clustered(np.random.default_rng(3), 40)
    score, other = 1 / (1 + np.exp(-first)), 1 / (1 + np.exp(-second))
    parts = [Resampled.of(each, label, user, user) for each in (score, other)]
    draws = UserDraws(40, 30, seed=7)
    together = replicates(parts, draws)
    monkeypatch.setattr("trainer.quality.bootstrap._MOST", 7 * user.size)
    for part, whole in zip(parts, together, strict=True):
        (alone,) = replicates([part], draws)
        for name in METRICS:
            assert alone[name] == pytest.approx(whole[name], rel=1e-12), name
    assert not np.array_equal(draws.times(0), UserDraws(40, 30, seed=8).times(0))
    assert all(draws.times(number).sum() == 40 for number in range(30))


def test_it_agrees_with_the_intervals_by_influence() -> None:
    """Of every metric that `measure` has an interval of, and of a paired difference."""
    first, second, label, user = clustered(np.random.default_rng(5), 400)
    request = user * 50 + np.arange(user.size) % 5
    score, other = 1 / (1 + np.exp(-first)), 1 / (1 + np.exp(-second))
    values = measure(score, label, request, user).as_dict()
    parts = [Resampled.of(each, label, request, user) for each in (score, other)]
    drawn, drawn_other = replicates(parts, UserDraws(400, 1000, seed=1))
    found = intervals({name: values[name] for name in METRICS}, drawn, 400)
    for name in METRICS:
        assert found[name].low < values[name] < found[name].high, name
        assert found[name].half == pytest.approx(values[f"{name}_ci"], rel=0.12), name
    lead = values["auc"] - measure(other, label, request, user).auc
    paired = Interval.of(lead, drawn["auc"] - drawn_other["auc"], 400)
    assert paired.half < found["auc"].half and paired.excludes(0)


def test_what_has_no_meaning_is_left_out_and_counted() -> None:
    values = np.array([0.5, 0.6, math.nan, 0.7, 0.8])
    found = Interval.of(0.6, values, users=3)
    assert (found.left_out, found.low, found.high) == (1, pytest.approx(0.5075), pytest.approx(0.7925))
    half_of_them = Interval.of(0.6, np.array([0.5, math.nan]), users=3)
    assert math.isnan(half_of_them.low) and half_of_them.left_out == 1
    for value, users in ((0.6, 1), (math.nan, 3)):
        empty = Interval.of(value, values, users)
        assert math.isnan(empty.low) and math.isnan(empty.high) and not empty.excludes(0)


def test_one_class_and_no_candidate_at_all() -> None:
    """A single positive: replicates without its user have no AUC, and no PCOC either."""
    user, label = np.arange(4), np.array([1.0, 0, 0, 0])
    draws = UserDraws(4, 200, seed=0)
    (found,) = replicates([Resampled.of(np.array([0.9, 0.1, 0.2, 0.3]), label, user, user)], draws)
    missing = np.array([draws.times(number)[0] == 0 for number in range(200)])
    assert missing.any() and np.array_equal(np.isnan(found["pcoc"]), missing)
    assert np.isnan(found["auc"][missing]).all() and np.isnan(found["gauc"]).all()
    assert not np.isnan(found["logloss"]).any()
    none = np.zeros(0, dtype=np.int64)
    (empty,) = replicates([Resampled.of([], [], none, none)], UserDraws(0, 3))
    assert all(np.isnan(values).all() for values in empty.values())
