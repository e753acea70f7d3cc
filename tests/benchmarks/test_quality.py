"""`bench quality`: stops at the first look that sees the target, and says when it was not reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launching import SETTINGS, overrides, tandemrec
from tests.helpers.logs import small_log

pytestmark = pytest.mark.slow


def rows(log: Path, folder: Path, **settings: Any) -> list[dict[str, Any]]:
    found = folder / "quality.json"
    changed = {"data.log": str(log), **SETTINGS, "quality.blocks": [1, 3], "quality.every": 2}
    changed |= {f"quality.{key}": value for key, value in settings.items()}
    words = ["--config", "configs/dare.toml", "--repeats", "2", "--json", str(found)]
    done = tandemrec("bench", "quality", *words, *overrides(changed))
    assert done.returncode == 0, done.stderr
    answer: list[dict[str, Any]] = json.loads(found.read_text())["rows"]
    return answer


def test_a_run_ends_at_the_target_or_has_failed(tmp_path: Path) -> None:
    log = small_log(tmp_path / "log", seed=4, users=40)
    failed = rows(log, tmp_path, target=0.999, most_steps=6)
    assert [(row["blocks"], row["seed"]) for row in failed] == [(1, 17), (3, 17), (1, 18), (3, 18)]
    assert all((row["reached"], row["steps"]) == (False, 6) for row in failed)
    assert all(row["samples"] > 6 * 10 and row["cpu_s"] > 0 for row in failed)
    # A label of noise is guessed as well by the first look as ever.
    reached = rows(log, tmp_path, target=min(row["auc"] for row in failed) - 0.05, most_steps=6)
    assert {row["reached"] for row in reached} == {True}
    assert min(row["steps"] for row in reached) < 6
