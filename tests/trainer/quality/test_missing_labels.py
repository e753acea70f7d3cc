"""Labels that were not observed have no part in the metrics of their task, nor in its baselines."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from pipelines.quality_report import remarks, slices_table, task_table
from trainer.quality.baselines import Baselines
from trainer.quality.domains import SplitMetrics
from trainer.quality.metrics import entry_of
from trainer.quality.rates import _Sums
from trainer.quality.scored import Scored

TASKS = ("click", "buy")


def scored(missing: np.ndarray) -> Scored:
    """60 candidates of 12 requests by 6 users; labels of the second task are missing where that is said."""
    rng, count = np.random.default_rng(3), 60
    score = rng.uniform(0.05, 0.95, (count, 2)).astype(np.float32)
    label = (rng.uniform(size=(count, 2)) < score).astype(np.float32)
    label[missing, 1] = np.nan
    place = np.arange(count)
    return Scored(score, label, place // 10, place // 5, place % 5, place, place % 7, TASKS)


def test_metrics_are_those_of_the_candidates_with_a_label() -> None:
    missing = np.random.default_rng(1).uniform(size=60) < 0.4
    # A whole user without a label is no user of that task.
    missing[:10] = True
    some, whole = scored(missing), scored(np.zeros(60, dtype=bool))
    metrics = some.all_metrics()
    assert metrics["click"] == whole.all_metrics()["click"]
    assert metrics["buy"] == some.part(~missing).metrics(1)
    assert metrics["buy"].samples == int((~missing).sum()) and metrics["buy"].users <= 5
    slices = some.by_history(task=1)
    assert sum(part.samples for part in slices.values()) == metrics["buy"].samples


def test_baselines_are_measured_on_the_same_candidates() -> None:
    missing = np.random.default_rng(1).uniform(size=60) < 0.4
    missing[:10] = True
    some = scored(missing)
    rates = np.random.default_rng(2).uniform(size=60)
    baselines = Baselines(some, {task: {"item_rate": rates} for task in TASKS}, [])
    part = some.part(~missing)
    other = Baselines(part, {task: {"item_rate": rates[~missing]} for task in TASKS}, [])
    found, expected = baselines.metrics(some)["buy"], other.metrics(part)["buy"]
    assert found == expected and math.isfinite(found["item_rate"]["auc_lead_ci"])


def test_a_task_without_any_label_is_said_and_no_crash() -> None:
    nothing = scored(np.ones(60, dtype=bool))
    measured = SplitMetrics(nothing.all_metrics())
    metrics = measured.tasks
    assert metrics["buy"].samples == 0 and math.isnan(metrics["buy"].auc)
    assert entry_of(metrics)["tasks"]["buy"]["samples"] == 0
    assert measured.text().splitlines()[-1].split() == ["buy", "no", "candidate", "has", "a", "label"]
    assert SplitMetrics({"buy": metrics["buy"]}).text() == " no candidate has a label"
    table = Baselines(nothing, {task: {"item_rate": np.full(60, 0.5)} for task in TASKS}, []).metrics(nothing)
    assert task_table("buy", metrics["buy"], table["buy"], "item_id")
    assert slices_table("buy", nothing.by_history(task=1))
    lines = remarks("test", measured, table, "item_id")
    assert "test, buy: all metrics are empty, since no candidate has a label" in lines


def test_rates_of_training_leave_missing_labels_out() -> None:
    keys = np.array([1, 1, 2, 2, 2])
    labels = np.array([[1, 0], [0, np.nan], [1, np.nan], [1, 1], [0, np.nan]], dtype=np.float32)
    sums = _Sums(np.array([2, 1, 7]), 2)
    sums.add(keys, labels)
    expected = [[(2 + 5) / 13, (1 + 5) / 11], [(1 + 5) / 12, (0 + 5) / 11], [0.5, 0.5]]
    rates = sums.rates(np.array([0.5, 0.5]))[sums.places(np.array([2, 1, 7]))]
    assert rates == pytest.approx(np.array(expected))


def test_labels_of_one_task_may_be_missing_where_another_has_them() -> None:
    missing = np.zeros(60, dtype=bool)
    missing[0] = True
    some = scored(missing)
    assert some.observed(0) is some
    assert replace(some, label=some.label[:, ::-1]).observed(0).score.shape[0] == 59
