"""Branches of a phase: what each trains, how they are merged, and going on inside any of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import pipelines.train
from embeddings.lookup.before_change import combined
from tests.helpers.launching import SETTINGS, overrides
from tests.helpers.logs import IN_PART, enrich, observed_in_part, random_rows, write_log
from tests.trainer.loop.test_phases import at, lines, same
from trainer.ranks.process_group import process_group
from trainer.run_config import Config, load_config

TASKS = {"tasks.bought.label": "buy", "tasks.click.weight": 2.0}
FLAT = {"decay": "none", "warmup_steps": 0}
ALONE, BOTH = {"weights": {"click": 0.0}}, {"weights": {}}
BRANCHES = [{"name": "target", **ALONE}, {"name": "both", **BOTH}]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = observed_in_part(enrich(random_rows(8), 8), 8)
    path = tmp_path_factory.mktemp("fork") / "log"
    write_log(path, {"train": rows, "validation": rows[:6], "test": rows[6:]}, rich=True, **IN_PART)
    return path


def config(log: Path, *phases: Mapping[str, Any], **changes: Any) -> Config:
    given = {**SETTINGS, "data.log": str(log), "checkpoint.every_steps": 1, "checkpoint.keep": 100}
    given |= {"data.domain": "city", **TASKS} | {k.replace("__", "."): v for k, v in changes.items()}
    base = load_config(Path("configs/dare.toml"), overrides(given)[1::2])
    return Config.model_validate({**base.model_dump(), "phases": list(phases)})


def run(folder: Path, settings: Config) -> Path:
    with process_group() as ranks:
        pipelines.train.run(settings, folder, ranks)
    return folder


def forked(branches: list[dict[str, Any]] = BRANCHES, steps: int = 4, **fork: Any) -> list[dict[str, Any]]:
    """A step, rounds of branches, and two more steps."""
    given = {"branches": branches, "every": 2, "task": "bought", "metric": "logloss", **fork}
    return [{"steps": 1, **FLAT}, {"steps": steps, **FLAT, "fork": given}, {"steps": 2, **FLAT}]


@pytest.fixture(scope="module")
def whole(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("whole") / "run", config(log, *forked()))


def test_branches_train_what_phases_of_their_weights_would(log: Path, whole: Path, tmp_path: Path) -> None:
    """Each from the weights at the fork and the same place in the data; the merge is that of whole tables."""
    ends = []
    for place, of in enumerate((ALONE, BOTH)):
        plain = run(tmp_path / str(place), config(log, {"steps": 1, **FLAT}, {"steps": 2, **FLAT, **of}))
        # Of the forked run, a step inside the branch; after its last one all is as at the fork again.
        assert same(at(plain, 2), at(whole, 2 + 2 * place))
        ends.append(at(plain, 3))
    assert same(at(whole, 1), at(whole, 3))
    (merge, _) = lines(whole, "merge")
    assert merge["step"] == 5 and merge["round"] == 1
    shares = [merge["lambda"][name] for name in ("target", "both")]
    merged = at(whole, 5)
    for name, tensor in merged.items():
        expected = combined([end[name] for end in ends], shares)
        assert torch.equal(tensor, expected) or name.endswith(".step"), name
    assert not same(at(whole, 1), merged)
