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
from trainer.assemble import resolve_groups
from trainer.log.schema import read_manifest
from trainer.loop.remarks import remarks
from trainer.run_config import load_config


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = enrich(random_rows(8, Shape(users=12)), seed=1)
    return write_log(tmp_path_factory.mktemp("log") / "log", {"train": rows}, rich=True)


def train_lines(log: Path, run: Path, **changes: Any) -> list[dict[str, Any]]:
    settings = {**SETTINGS, "data.log": str(log), "train.log_every": 2, "train.max_steps": 4, **changes}
    pipelines.train.train(ROOT / "configs" / "dare.toml", run, overrides(settings)[1::2])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"]


def test_several_tasks_are_told_apart_and_ranking_losses_beside_what_they_join(
    log: Path, tmp_path: Path
) -> None:
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


def test_settings_of_losses_without_effect_are_named(log: Path) -> None:
    words = [
        "train.objective=focal",
        "tasks.click.loss=bce",
        "tasks.click.rank=pair",
        "tasks.click.mean=domain",
    ]
    config, manifest = (
        load_config(ROOT / "configs/dare.toml", [f"data.log={log}", *words]),
        read_manifest(log),
    )
    (line,) = [
        line for line in remarks(config, manifest, resolve_groups(config, manifest)) if "objective" in line
    ]
    assert "train.objective (every task names a loss of its own)" in line
    assert 'tasks.click.mean = "domain" for the ranking loss' in line


def test_losses_by_domain_need_no_table_of_it(log: Path, tmp_path: Path) -> None:
    domain = {
        "data.domain": "city",
        "tasks.click.mean": "domain",
        "groups.representation.features": ["item_id"],
    }
    pooled = train_lines(log, tmp_path / "pooled", **{"tasks.click.label": "click"})
    by_domain = train_lines(log, tmp_path / "domains", **domain)
    # The sum over seven domains of means that are each about as large.
    assert 4 < by_domain[0]["loss"] / pooled[0]["loss"] < 8
