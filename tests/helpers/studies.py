"""Small studies on a small log: a trial takes a fifth of a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines.tune.plan import StudyPlan, read_plan
from pipelines.tune.study import SharedStudy
from tests.helpers.launching import ROOT, SETTINGS, overrides

CONFIG = ROOT / "configs" / "dare.toml"
RATES = """
[parameters]
train.learning_rate = { low = 3e-4, high = 3e-2, log = true }
"groups.*.learning_rate" = { low = 0.01, high = 1.0, log = true }
"""
BUDGET = """
[trial.train]
max_steps = 4
validate_every = 2
"""
STUDY = """
[study]
trials = 4
random_trials = 2
pruner = "none"
"""


def given(log: Path, **changes: Any) -> list[str]:
    """Overrides of a small run."""
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return overrides({"data.log": str(log), **SETTINGS, "checkpoint.every_steps": 1, **named})[1::2]


def space_in(folder: Path, *parts: str) -> Path:
    file = folder / "space.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(parts or (STUDY, BUDGET, RATES)), encoding="utf-8")
    return file


def plan_of(folder: Path, log: Path, *parts: str, trials: int = 0, **changes: Any) -> StudyPlan:
    return read_plan(CONFIG, space_in(folder, *parts), given(log, **changes), trials)


def shared(plan: StudyPlan, folder: Path) -> SharedStudy:
    folder.mkdir(parents=True, exist_ok=True)
    return SharedStudy(plan, folder)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
