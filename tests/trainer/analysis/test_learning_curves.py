"""Learning curves of whole, cut, resumed and forked runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.analysis.learning_curves import Curve, over_seeds, read_curves, smoothed


def trained(step: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"step": step, "split": "train", "loss": loss, "samples": 10, **more}


def validated(step: int, auc: float, split: str = "validation", **more: Any) -> dict[str, Any]:
    return {"step": step, "split": split, "tasks": {"click": {"auc": auc, "pcoc": None}}, **more}


def write(file: Path, *lines: dict[str, Any] | str) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
    file.write_text("".join(texts), encoding="utf-8")
    return file


def test_points_by_split_task_and_metric(tmp_path: Path) -> None:
    both = {"a": {"loss": 0.2}, "b": {"loss": None}}
    lines = (trained(10, 0.7), trained(20, 0.6, tasks=both, phase="one"), validated(20, 0.8, phase="two"))
    found = read_curves(write(tmp_path / "metrics.jsonl", *lines, validated(5, 0.6, "window", window="w1")))
    assert found.points == {
        Curve("train", "loss"): {10: 0.7, 20: 0.6},
        Curve("train", "loss", "a"): {20: 0.2},
        Curve("validation", "auc", "click"): {20: 0.8},
        Curve("window", "auc", "click"): {5: 0.6},
    }
    assert (found.cut_short, found.repeated, found.phases) == (0, 0, ("one", "two"))
    assert (found.steps("train"), found.steps("validation"), found.steps("test")) == (20, 20, -1)
    assert read_curves(tmp_path / "none.jsonl").points == {}


def test_lines_that_are_no_reports_are_counted(tmp_path: Path) -> None:
    """A name with another line separator inside of it is none of them."""
    cut = json.dumps(validated(20, 0.8))[:40]
    odd = ("[1, 2]\n", '{"step": "x", "split": "train"}\n', "\n")
    whole = validated(10, 0.7, window="a\u2028b"), {"step": 3, "split": "version", "path": "x"}
    found = read_curves(write(tmp_path / "metrics.jsonl", *whole, *odd, trained(1, 0.5), cut))
    assert found.cut_short == 3
    assert found.points == {
        Curve("train", "loss"): {1: 0.5},
        Curve("validation", "auc", "click"): {10: 0.7},
    }
    bytes_of = (tmp_path / "metrics.jsonl").read_bytes() + b"\xff\xfe"
    (tmp_path / "metrics.jsonl").write_bytes(bytes_of)
    assert read_curves(tmp_path / "metrics.jsonl").cut_short == 3


def test_a_step_that_a_resumed_run_says_again_counts_once(tmp_path: Path) -> None:
    lines = trained(10, 0.7), trained(20, 0.6), trained(10, 0.65), trained(20, math.nan)
    found = read_curves(write(tmp_path / "metrics.jsonl", *lines))
    assert found.points == {Curve("train", "loss"): {10: 0.65, 20: 0.6}} and found.repeated == 1


def test_branches_of_a_fork_pass_the_same_steps(tmp_path: Path) -> None:
    lines = [trained(step, 0.5, round=1, branch=branch) for branch in ("a", "b") for step in (10, 20)]
    found = read_curves(
        write(tmp_path / "metrics.jsonl", trained(5, 0.9), *lines, trained(10, 0.4, round=2, branch="a"))
    )
    assert found.repeated == 0
    assert {curve.branch: [*points] for curve, points in found.points.items()} == {
        "": [5],
        "a, round 1": [10, 20],
        "b, round 1": [10, 20],
        "a, round 2": [10],
    }


def test_mean_and_spread_over_seeds() -> None:
    found = over_seeds([{10: 0.5, 20: 0.6, 25: 0.9}, {10: 0.7, 20: 0.8}, {10: 0.6}])
    assert found.steps.tolist() == [10, 20] and found.runs.tolist() == [3, 2]
    assert found.mean == pytest.approx([0.6, 0.7]) and found.spread
    assert found.deviation == pytest.approx([0.1, np.std([0.6, 0.8], ddof=1)])
    single = over_seeds([{10: 0.5, 20: 0.6}])
    assert not single.spread and np.isnan(single.deviation).all() and single.mean.tolist() == [0.5, 0.6]
    assert over_seeds([]).steps.size == 0


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=40), st.integers(1, 9))
def test_smoothing_is_a_mean_of_neighbours(values: list[float], width: int) -> None:
    found, half = smoothed(np.array(values), width), (width - 1) // 2
    for place in range(len(values)):
        reach = min(half, place, len(values) - 1 - place)
        assert found[place] == pytest.approx(np.mean(values[place - reach : place + reach + 1]), abs=1e-9)
