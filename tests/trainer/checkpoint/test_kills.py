"""SIGKILL before every file operation of a save, on one rank and on one of two."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launching import launched


def kill_points(root: Path, *words: int | str) -> list[dict[str, Any]]:
    done = launched("tests.programs.kill_points", str(root), *map(str, words), timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(points: list[dict[str, Any]]) -> set[str]:
    """What holds at every point; -> the stages that were met."""
    kills = [point for point in points if point.get("before")]
    for point in kills:
        # Step 2 was finished before; nothing half made or half deleted is ever taken for a checkpoint.
        assert point["newest"] in ("step-00000002", "step-00000003") and not point["refused"], point
        assert point["value"] == float(point["newest"][-1]), point
        published = "step-00000003" in point["left"]
        assert published == (point["newest"] == "step-00000003"), point
        assert "step-00000002" in point["left"], point
    assert all(
        not [name for name in point["after"] if ".tmp-" in name] and "step-00000004" in point["after"]
        for point in points
        if "after" in point
    )
    last = points[-1]
    assert not last["before"] and last["left"] == ["step-00000002", "step-00000003"], last
    return {re.sub(r"\.tmp-\w+", ".tmp", point["before"]) for point in kills}


@pytest.mark.slow
def test_killed_at_every_stage_of_a_save(tmp_path: Path) -> None:
    points = kill_points(tmp_path, 1, 0, 1)
    stages = check(points)
    assert len(points) > 40
    assert stages >= {
        "os.mkdir step-00000003.tmp", "open __0_0.distcp", "write", "fsync __0_0.distcp",
        "fsync .metadata.tmp", "open state.json", "open manifest.json", "fsync manifest.sha256",
        "fsync step-00000003.tmp", "os.rename step-00000003.tmp", "fsync checkpoints",
        "os.rename step-00000001", "shutil.rmtree step-00000001.tmp", "os.rmdir step-00000001.tmp",
    }  # fmt: skip


@pytest.mark.slow
def test_one_of_two_ranks_killed_while_saving(tmp_path: Path) -> None:
    """The other one hears of it, and fails with an error instead of waiting."""
    points = kill_points(tmp_path, 2, 1, 4)
    stages = check(points)
    assert {"open __1_0.distcp", "write"} & stages
    for point in points:
        if point.get("before"):
            assert point["codes"] == [1, -9], point


@pytest.mark.slow
def test_killed_at_every_stage_of_a_save_of_touched_rows(tmp_path: Path) -> None:
    """The delta is there whole, with what it builds on, or the full one before it is the newest."""
    points = kill_points(tmp_path, 1, 0, 1, "deltas")
    stages = check(points)
    assert len(points) > 40
    assert stages >= {
        "os.mkdir step-00000003.tmp", "open __0_0.distcp", "open delta-00000.safetensors", "append",
        "fsync delta-00000.safetensors", "open state.json", "os.rename step-00000003.tmp",
        "os.rename step-00000001", "shutil.rmtree step-00000001.tmp",
    }  # fmt: skip
