"""What metrics.jsonl says of the losses of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import pipelines.train
from tests.helpers.launching import ROOT, SETTINGS, overrides
from tests.helpers.logs import Shape, enrich, random_rows, write_log


def train_lines(log: Path, run: Path, **changes: Any) -> list[dict[str, Any]]:
    settings = {**SETTINGS, "data.log": str(log), "train.log_every": 2, "train.max_steps": 4, **changes}
    pipelines.train.train(ROOT / "configs" / "dare.toml", run, overrides(settings)[1::2])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"]


def test_several_tasks_are_told_apart_and_ranking_losses_beside_what_they_join(tmp_path: Path) -> None:
    rows = enrich(random_rows(8, Shape(users=12)), seed=1)
    log = write_log(tmp_path / "log", {"train": rows}, rich=True)
    plain = train_lines(log, tmp_path / "plain")
    assert len(plain) == 2 and all(list(line["tasks"]) == ["click", "buy"] for line in plain)
    for line in plain:
        assert line["loss"] == pytest.approx(sum(own["loss"] for own in line["tasks"].values()) / 2)
    tasks = {"tasks.click.rank": "pair", "tasks.buy.weight": 0.5, "tasks.buy.loss": "focal"}
    for line in train_lines(log, tmp_path / "ranked", **tasks):
        click, buy = line["tasks"]["click"], line["tasks"]["buy"]
        assert line["loss"] == pytest.approx(click["loss"] + 0.5 * buy["loss"])
        assert click["loss"] == pytest.approx((click["bce"] + click["pair"]) / 2)
        assert click["negative_gradient"] > 0 and list(buy) == ["loss"]
    board = EventAccumulator(str(tmp_path / "ranked" / "tensorboard")).Reload()
    assert {"train/loss", "train/click/pair", "train/buy/loss"} <= set(board.Tags()["scalars"])
