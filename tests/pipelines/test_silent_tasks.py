"""A run with sets whose validation and test observe nothing of one task: said once each, and on the board."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pipelines.train
from pipelines.evaluate import evaluate
from pipelines.export import export
from tests.helpers.launching import SETTINGS, overrides
from tests.helpers.logs import Row, Shape, enrich, random_rows, write_log
from trainer.quality.history_free import history_free_entry, history_free_line
from trainer.ranks.process_group import process_group
from trainer.run_config import load_config

TASKS = {"click": "click", "buy": "buy", "again": "click"}


def rows(seed: int, observed: bool) -> list[Row]:
    found = enrich(random_rows(seed, Shape(users=8)), seed)
    nothing = [{"label_buy": [[None] * len(part) for part in row["label_buy"]]} for row in found]
    return found if observed else [{**row, **none} for row, none in zip(found, nothing, strict=True)]


@pytest.mark.parametrize("tasks", [("click", "buy"), ("click", "buy", "again")])
def test_a_task_without_a_label_in_a_split_is_said_once(
    tasks: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    splits = {"train": rows(1, True), "validation": rows(2, False), "test": rows(3, False)}
    free = {"task": "click", "id_order": None}
    free |= {
        name: {"test": value} for name, value in (("auc", 0.53), ("popularity", 0.49), ("candidates", 9))
    }
    report = {"history_free": free}
    log = write_log(tmp_path / "log", splits, rich=True, partial=["buy"], report=report)
    words = {k: v for k, v in SETTINGS.items() if k != "model.hidden"}
    words |= {"data.log": str(log), "train.max_steps": 2, "data.domain": "city"}
    words |= {f"tasks.{task}.label": TASKS[task] for task in tasks}
    run = tmp_path / "run"
    with process_group() as ranks:
        pipelines.train.run(load_config(Path("configs/stem.toml"), overrides(words)[1::2]), run, ranks)
    said = capfd.readouterr().out
    reason = "no candidate has a label"
    assert f"\n  buy    {reason}\n" in said
    assert said.count(f"validation, buy: all metrics are empty, since {reason}") == 1
    entry = evaluate(run, "test")
    said = capfd.readouterr().out
    assert said.count(f"test, buy: all metrics are empty, since {reason}") == 1 and "nan" not in said
    lines = [line.split() for line in said.splitlines() if re.search(r"\bbuy\b", line)]
    # What ingest measured of this split stands below the tables, and in the summary.
    assert history_free_line("test", report)[0] in said.splitlines()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test_history_free"] == history_free_entry("test", report) != {}
    several = len(tasks) > 2
    # Besides the sentence there is only the line of the table of tasks.
    assert len(lines) == (2 if several else 1) and (not several or lines[0][:3] == ["buy", "0", "0"])
    assert entry["tasks"]["buy"]["samples"] == 0 and "over_domains" in entry
    export(run, tmp_path / "snapshot")
    said = capfd.readouterr().out
    (line,) = (line for line in said.splitlines() if line.startswith("AUC of buy "))
    assert f"; {reason}; largest difference " in line and "all of these labels are alike" not in said
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    metrics = {f"{part}{name}" for part in ("", "click/") for name in ("auc", "gauc", "logloss", "pcoc")}
    assert {f"validation/{name}" for name in metrics} <= tags
    assert {"train/loss", *(f"train/{task}/loss" for task in tasks)} <= tags
    assert {f"validation by domain/0/{part}logloss" for part in ("", "click/")} <= tags
    # What has no value has no curve; that nothing was observed has one.
    assert {tag for tag in tags if "/buy/auc" in tag or "/buy/logloss" in tag} == set()
    assert board.Scalars("validation/buy/samples")[0].value == 0
    assert all(math.isfinite(event.value) for tag in tags for event in board.Scalars(tag))
