"""Slices, calibration curves and paired comparisons against plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.metrics import clustered
from trainer.analysis.calibration import calibration_curve
from trainer.analysis.slices import (
    Comparison,
    Measured,
    TaskCandidates,
    by_age,
    by_domain,
    by_frequency,
    by_history,
    measured,
    over_runs,
)
from trainer.quality.bootstrap import UserDraws
from trainer.quality.metrics import measure
from trainer.quality.ranking import Floats

DAY = 86_400


def two_models(users: int, seed: int = 0) -> tuple[TaskCandidates, TaskCandidates]:
    """The candidates of some users, scored well and less well."""
    good, poor, label, user = clustered(np.random.default_rng(seed), users)
    request = user * 100 + np.arange(user.size) % 4
    scores = (1 / (1 + np.exp(-each)) for each in (good, poor))
    first, second = (TaskCandidates(score, label, request, user) for score in scores)
    return first, second


def test_parts_are_named_and_every_candidate_is_in_one() -> None:
    history = by_history(np.array([0, 1, 9, 10, 4999, 5000, 70_000]))
    assert [history.parts[place] for place in history.of] == [
        *("0", "1 to 9", "1 to 9", "10 to 49", "1,000 to 4,999", "5,000 or more", "5,000 or more")
    ]
    frequency = by_frequency(np.array([0, 1, 9, 10, 10**6]))
    assert [frequency.parts[place] for place in frequency.of] == [
        *("0 (cold)", "1 to 9", "1 to 9", "10 to 99", "100,000 or more")
    ]
    unknown = by_frequency(np.array([0, 10**6, 5]), np.array([False, True, False]))
    assert [unknown.parts[place] for place in unknown.of] == ["0 (cold)", "unknown item", "1 to 9"]
    age = by_age(np.array([0.0, 3599, 3600, DAY, 7 * DAY - 1, 400 * DAY, math.nan]))
    assert [age.parts[place] for place in age.of] == [
        *("up to 1 hour", "up to 1 hour", "1 hour to 1 day", "1 to 7 days", "1 to 7 days"),
        *("more than 365 days", "no behavior"),
    ]
    domain = by_domain(np.array([7, 3, 3, 9]), {3: "feed"})
    assert domain.parts == ("feed", "7", "9") and domain.of.tolist() == [1, 0, 0, 2]


def test_each_part_is_measured_by_itself_with_the_same_draws() -> None:
    whole, _ = two_models(30)
    part = whole.part(whole.user % 2 == 0)
    draws = UserDraws(30, 200, seed=3)
    found = measured([whole, part], draws)
    assert found[1].metrics == measure(part.score, part.label, part.group, part.user)
    assert (found[0].users, found[1].users) == (30, 15)
    (alone,) = measured([part], draws)
    assert alone.intervals == found[1].intervals
    low, high = np.percentile(found[0].drawn["auc"], [2.5, 97.5])
    assert (found[0].intervals["auc"].low, found[0].intervals["auc"].high) == (low, high)


def test_the_better_of_two_is_told_and_equals_are_not() -> None:
    good, poor = two_models(200)
    draws = UserDraws(200, 400, seed=1)
    first, second = ([each] for each in measured([good, poor], draws))
    for metric in ("auc", "gauc", "logloss"):
        found = Comparison.of(metric, "A", first, "B", second)
        lead = getattr(first[0].metrics, metric) - getattr(second[0].metrics, metric)
        assert found.difference.value == pytest.approx(lead)
        if metric != "gauc":  # too few requests hold both classes to tell
            assert found.told and found.sentence().startswith("A is better than B by ")
            assert Comparison.of(metric, "B", second, "A", first).sentence() == found.sentence()
    sentence = Comparison.of("auc", "A", first, "B", second).sentence()
    value, low, high = (float(word.strip("[],")) for word in sentence.split()[6:9])
    assert 0 < low < value < high and sentence.endswith("] AUC")
    same = Comparison.of("auc", "A", first, "A again", first)
    assert not same.told and (same.difference.low, same.difference.high) == (0, 0)
    assert (
        same.sentence() == "no difference can be told between A and A again: AUC +0.0000 [+0.0000, +0.0000]"
    )


def test_a_difference_is_paired_and_seeds_are_averaged() -> None:
    """Models that differ by noise: their difference is known far better than each of them."""
    good, _ = two_models(200)
    rng = np.random.default_rng(2)
    noisy = [
        TaskCandidates((good.score + rng.normal(0, 0.01, good.score.size)).clip(0, 1), *_rest(good))
        for _ in range(2)
    ]
    base, *seeds = measured([good, *noisy], UserDraws(200, 300, seed=1))
    found = Comparison.of("auc", "base", [base], "noisy", seeds)
    assert found.difference.half < base.intervals["auc"].half / 5
    mean = np.mean([each.metrics.auc for each in seeds])
    assert found.difference.value == pytest.approx(base.metrics.auc - mean)
    joint = over_runs("auc", seeds)
    drawn = (seeds[0].drawn["auc"] + seeds[1].drawn["auc"]) / 2
    assert joint.value == pytest.approx(mean) and joint.low == np.percentile(drawn, 2.5)


def _rest(part: TaskCandidates) -> tuple[Floats, ...]:
    return part.label, part.group, part.user  # type: ignore[return-value]


def test_one_user_and_one_class_have_no_interval() -> None:
    part = TaskCandidates(np.array([0.2, 0.7]), np.array([0.0, 1]), np.zeros(2, int), np.zeros(2, int))
    (alone,) = measured([part], UserDraws(1, 10))
    assert alone.metrics.auc == 1 and math.isnan(alone.intervals["auc"].low)
    other: list[Measured] = measured([part], UserDraws(1, 10))
    told = Comparison.of("auc", "A", [alone], "B", other)
    assert not told.told and "no difference can be told" in told.sentence()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.booleans())
def test_calibration_bins_are_a_partition_with_the_rates_of_a_loop(seed: int, bins: int, tied: bool) -> None:
    part, _ = two_models(12, seed)
    score = part.score.round(1) if tied else part.score
    part = TaskCandidates(score, *_rest(part))  # type: ignore[arg-type]
    draws = UserDraws(12, 20, seed=seed)
    found = calibration_curve(part, draws, bins)
    assert sum(each.candidates for each in found) == score.size and len(found) <= bins
    order, first = np.sort(score), 0
    for each in found:
        inside = np.isin(score, order[first : first + each.candidates])
        first += each.candidates
        assert inside.sum() == each.candidates  # equal scores share a bin
        assert each.prediction == pytest.approx(score[inside].mean())
        assert each.rate.value == pytest.approx(part.label[inside].mean())
        rates = []
        for number in range(20):
            weight = draws.times(number)[part.user[inside]]
            if weight.sum():
                rates.append(float((weight * part.label[inside]).sum() / weight.sum()))
        if not math.isnan(each.rate.low):
            low, high = np.percentile(rates, [2.5, 97.5])
            assert (each.rate.low, each.rate.high) == pytest.approx((low, high))
        assert each.rate.left_out == 20 - len(rates)


def test_no_candidate_has_no_calibration_curve() -> None:
    none = np.zeros(0, dtype=np.int64)
    assert calibration_curve(TaskCandidates(np.zeros(0), np.zeros(0), none, none), UserDraws(0, 5)) == []
