"""Losses of a step whose candidates lie on two ranks: those of one rank."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launching import launched
from tests.helpers.logs import Shape, enrich, random_rows, write_log

# Models, and parts that are a task's own; under STEM tables, what reads them, experts, gate and tower.
STEPS = {
    "towers": ("head.towers.buy",),
    "sets": (
        "representation/buy/",
        "sequences.buy.",
        "banks.task_buy.",
        "gates.task_buy.",
        "towers.task_buy.",
        "auxiliary.",
    ),
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = enrich(random_rows(8, Shape(users=12)), seed=1)
    return write_log(tmp_path_factory.mktemp("log") / "log", {"train": rows}, rich=True)


def reported(log: Path, folder: Path, ranks: int) -> Any:
    done = launched("tests.programs.loss_cases", str(log), str(folder), ranks=ranks)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def of_two(log: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = reported(log, tmp_path_factory.mktemp("two"), 2)
    return found


@pytest.fixture(scope="module")
def of_one(log: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = reported(log, tmp_path_factory.mktemp("one"), 1)
    return found


@pytest.fixture
def found(of_two: dict[str, Any]) -> dict[str, Any]:
    cases: dict[str, Any] = of_two["cases"]
    return cases


def numbers(report: dict[str, Any]) -> dict[str, float]:
    tasks = {
        f"{task}/{name}": value
        for task, own in report.get("tasks", {}).items()
        for name, value in own.items()
    }
    return {**{name: value for name, value in report.items() if name != "tasks"}, **tasks}


def test_gradients_and_reports_of_two_ranks_are_those_of_one(found: dict[str, Any]) -> None:
    assert len(found) == 2 * (3 + 16 + 4) + 1
    for name, each in found.items():
        assert each["far"] < 1e-6, name
        one, two = numbers(each["expected"]), numbers(each["report"])
        assert one == pytest.approx(two, rel=1e-5, nan_ok=True), name


def test_positives_of_all_ranks_are_retrieved_among_the_candidates_of_all(of_two: dict[str, Any]) -> None:
    assert len(of_two["retrieval"]) == 2
    for each in of_two["retrieval"]:
        assert each["far"] < 1e-6 * each["largest"] and each["largest"] > 0.01
        assert each["report"] == pytest.approx(each["expected"], rel=1e-6)


def test_all_ranks_know_what_nobody_observed(found: dict[str, Any]) -> None:
    never = found["never observed"]
    tasks = never["report"]["tasks"]
    assert never["silent"] == [["a"], ["a"]] and math.isnan(tasks["a"]["pair"]) and tasks["b"]["loss"] > 0
    assert all(each["silent"] == [[], []] for name, each in found.items() if name != "never observed")


def test_a_task_that_nobody_observed_in_a_step_leaves_what_is_its_own_alone(
    of_one: dict[str, Any], of_two: dict[str, Any]
) -> None:
    """After steps that Adam remembers; optimizer states, too."""
    for found, model in product((of_one, of_two), STEPS):
        changed = found["steps"][model]["changed"]
        both, alone = changed[:2], changed[2:]
        for part in STEPS[model]:
            assert all(any(part in name for name in names) for names in both), part
            other = part.replace("buy", "click")
            assert other == part or all(any(other in name for name in names) for names in alone), part
        own = [name for names in alone for name in names if "buy" in name or "auxiliary." in name]
        assert len(alone) == 3 and not own


def test_steps_of_candidates_as_they_are_read_have_the_losses_of_one_rank(
    of_one: dict[str, Any], of_two: dict[str, Any]
) -> None:
    """A ranking loss over all ranks, from a log; later steps follow from weights that differ by rounding."""
    for model in STEPS:
        one, two = (found["steps"][model]["losses"] for found in (of_one, of_two))
        assert two[0] == pytest.approx(one[0], rel=1e-6) and two == pytest.approx(one, rel=1e-3)
