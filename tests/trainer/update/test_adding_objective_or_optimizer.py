"""The worked examples of docs/architecture.md, used as a user would use them: by a word in the config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import pipelines.train
from embeddings.optimizers import ROW_OPTIMIZERS
from tests.embeddings.test_optimizers import check_record
from tests.helpers.launching import SETTINGS, losses, overrides
from tests.helpers.logs import small_log
from trainer.objectives.losses import Objective
from trainer.objectives.table import OBJECTIVES
from trainer.run_config import load_config

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def section(heading: str) -> str:
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, heading
    return found[1]


def code(heading: str) -> dict[str, Any]:
    """The names that the section's Python file defines."""
    (text,) = re.findall(r"^```python\n(.*?)^```", section(heading), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(text, heading, "exec"), names)
    return names


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("log") / "log", seed=1, users=8)


def losses_of_run(log: Path, run: Path, **changes: Any) -> list[float]:
    """Of the first steps of a run that is started by its config."""
    settings = {**SETTINGS, "data.log": str(log), "train.log_every": 1, "train.max_steps": 3, **changes}
    pipelines.train.train(ROOT / "configs" / "dare.toml", run, overrides(settings)[1::2])
    return losses(run)


def test_an_objective_is_one_file_and_one_line(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heading = "Adding an objective"
    (line,) = re.findall(r"The line in the table is `(.*?),?`", section(heading))
    (entry,) = eval(f"{{{line}}}", {**code(heading), "Objective": Objective}).items()
    monkeypatch.setitem(OBJECTIVES, *entry)
    plain = losses_of_run(log, tmp_path / "plain")
    brier = losses_of_run(log, tmp_path / "brier", **{"train.objective": "brier"})
    of_task = losses_of_run(log, tmp_path / "task", **{"tasks.click.loss": "brier"})
    # The same logits at first: an error of d costs d^2, and by the cross entropy -log(1 - d).
    assert len(brier) == len(plain) == 3 and 0 < brier[0] < plain[0] and of_task == brier


def test_a_row_optimizer_is_one_record(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever the example adds is taken out again.
    monkeypatch.setitem(ROW_OPTIMIZERS, "damped_adagrad", ROW_OPTIMIZERS["sgd"])
    code("Adding a row optimizer")
    assert ROW_OPTIMIZERS["damped_adagrad"].title == "damped Adagrad"
    check_record("damped_adagrad", [[0, 1, 1, 5], [1, 2]], seed=4)
    words: dict[str, Any] = {"groups.attention.optimizer": "damped_adagrad"}
    replicated = {**words, "groups.attention.sharding": ["data_parallel"]}
    fused = losses_of_run(log, tmp_path / "fused", **words)
    plain = losses_of_run(log, tmp_path / "plain", **replicated)
    other = losses_of_run(log, tmp_path / "other")
    assert fused == pytest.approx(plain, rel=1e-5) and fused[0] == other[0] and fused[2] != other[2]
    config = load_config(tmp_path / "fused" / "config.toml")
    assert config.groups["attention"].optimizer == "damped_adagrad"
