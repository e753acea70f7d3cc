"""Trainings with incremental checkpoints: every tensor is what a full save of the same moment holds."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.launching import reported


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = reported("tests.programs.delta_runs", tmp_path_factory.mktemp("deltas"))
    return found


def chained(checkpoints: dict[str, dict[str, Any]]) -> None:
    steps = sorted(checkpoints)
    assert [checkpoints[step]["base"] for step in steps] == [None, *steps[:-1]]
    assert [checkpoints[step]["differ"] for step in steps] == [[]] * len(steps)


def test_one_chain_goes_on_over_2_and_1_and_3_ranks(report: dict[str, Any]) -> None:
    """Row-wise and whole tables, with TorchRec's pipeline that works ahead."""
    chained(report["resharded"])
    assert list(report["resharded"]) == [f"step-{step:08d}" for step in range(1, 8)]


def test_tables_of_columns_and_sets(report: dict[str, Any]) -> None:
    """Saved in the background, with validations between; data-parallel tables are saved whole."""
    chained(report["columns"])
    last = report["columns"]["step-00000004"]
    rows = [name for name in last["names"] if name in last["rows of"]]
    assert len(rows) == 8 and all("representation" in name for name in rows)
    assert any(".attention." in name and "momentum1" in name for name in last["names"])


def test_without_a_state_and_in_half_precision(report: dict[str, Any]) -> None:
    chained(report["sgd"])


def test_whoever_uses_a_checkpoint_reads_its_chain(report: dict[str, Any]) -> None:
    """`unshard`, and so `--init-from`; `export`; `evaluate`, on whose model this looks."""
    used = report["used"]
    assert used["exported"] == "v00000001"
    assert len(used["unsharded"]) == 4 and all(used["unsharded"])
    assert len(used["restored"]) > 4 and all(used["restored"])
