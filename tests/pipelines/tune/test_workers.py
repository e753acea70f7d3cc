"""Studies whose workers die, or are several, or have two ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.launching import reported


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return reported("tests.programs.study_runs", tmp_path_factory.mktemp("studies"), timeout=120)


def result(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("trial", "state", "value", "parameters", "steps", "validations")}


def test_a_killed_study_ends_as_an_uninterrupted_one(report: dict[str, Any]) -> None:
    assert report["codes"]["killed"] == [-9]
    assert [row["state"] for row in report["before"]] == ["complete", "complete"]
    assert report["codes"]["resumed"] == report["codes"]["whole"] == [0]
    whole, killed = report["rows"]["whole"], report["rows"]["killed"]
    assert len(whole) == 4
    assert [*map(result, killed)] == [*map(result, whole)]
    assert [row["starts"] for row in killed] == [1, 1, 2, 1]
    assert "resumed from" in report["logs"]["killed"]


def test_workers_share_the_trials_of_one_study(report: dict[str, Any]) -> None:
    assert report["codes"]["many"] == [0, 0, 0]
    rows = report["rows"]["many"]
    assert [(row["trial"], row["state"], row["starts"]) for row in rows] == [
        (number, "complete", 1) for number in range(4)
    ]
    # The first two draw without a look at others.
    assert [row["parameters"] for row in rows[:2]] == [
        row["parameters"] for row in report["rows"]["whole"][:2]
    ]


def test_ranks_end_a_trial_together(report: dict[str, Any]) -> None:
    assert report["codes"]["ranks"] == [0, 0]
    rows = report["rows"]["ranks"]
    assert [row["state"] for row in rows] == ["complete", "pruned", "complete", "complete"]
    assert [row["steps"] for row in rows] == [rows[0]["steps"], 2, rows[0]["steps"], rows[0]["steps"]]
    assert list(rows[1]["validations"]) == ["2"]
    assert rows[1]["value"] is None
    log = report["logs"]["pruned"]
    assert "step-00000001" in log and "step-00000002" not in log
    assert log.rstrip().endswith("pruned after step 2: nothing more is saved")
