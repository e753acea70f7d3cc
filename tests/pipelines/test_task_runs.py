"""A run with tasks of its own, from the log to the scores: masks, partial labels, a domain."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from embeddings.errors import ConfigError
from pipelines.evaluate import evaluate
from pipelines.export import export
from pipelines.quality_report import baselines_key
from pipelines.score import score
from pipelines.train import run as train_run
from tests.helpers.launching import SETTINGS, overrides
from tests.helpers.logs import IN_PART, Row, enrich, observed_in_part, random_rows, write_log
from tests.trainer.test_ranks import parameters
from trainer.ranks.process_group import process_group
from trainer.run_config import Config, load_config
from trainer.snapshot import load_snapshot

TASKS = {
    "tasks.bought.label": "buy",
    "tasks.click.weight": 2.0,
    "tasks.sold.label": "buy",
    "tasks.sold.mask": "click == 1",
}


def trained(config: Config, run: Path) -> None:
    with process_group() as ranks:
        train_run(config, run, ranks)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return observed_in_part(enrich(random_rows(8), 8), 8)


@pytest.fixture(scope="module")
def made(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log, and a run of three tasks, measured and exported."""
    root = tmp_path_factory.mktemp("tasks")
    write_log(root / "log", {"train": rows, "validation": rows[:6], "test": rows[6:]}, rich=True, **IN_PART)
    trained(config(root / "log"), root / "run")
    return root


def config(log: Path, **changes: Any) -> Config:
    words = {**SETTINGS, "data.log": str(log), "train.max_steps": 3}
    words |= {"data.domain": "city", **TASKS} | {k.replace("__", "."): v for k, v in changes.items()}
    return load_config(Path("configs/dare.toml"), overrides(words)[1::2])


def test_evaluate_measures_tasks_where_they_were_observed(made: Path, rows: list[Row]) -> None:
    entry = evaluate(made / "run", "test")
    assert list(entry["tasks"]) == ["bought", "click", "sold"]
    table = pq.read_table(made / "run" / "scores-test.parquet")
    found = {name: table.column(f"label_{name}").to_numpy() for name in ("bought", "click", "sold")}
    assert not np.isnan(found["click"]).any() and 0.3 < np.isnan(found["bought"]).mean() < 0.5
    wanted = np.where(found["click"] == 1, found["bought"], np.nan)
    np.testing.assert_array_equal(found["sold"], wanted)
    summary = json.loads((made / "run" / "summary.json").read_text())
    rates = summary[baselines_key("test")]["mean_label"]["tasks"]
    observed = [
        (click, buy)
        for row in rows
        for clicks, buys in zip(row["label_click"], row["label_buy"], strict=True)
        for click, buy in zip(clicks, buys, strict=True)
        if buy is not None and not math.isnan(buy)
    ]
    assert list(rates) == ["bought", "click", "sold"]
    means = {"bought": np.mean([b for _, b in observed]), "sold": np.mean([b for c, b in observed if c == 1])}
    for task, mean in means.items():
        part = found[task][~np.isnan(found[task])]
        logloss = -np.mean(part * np.log(mean) + (1 - part) * np.log(1 - mean))
        assert rates[task]["logloss"] == pytest.approx(logloss, rel=1e-5)


def test_scores_need_no_labels_and_know_tasks_by_name(
    made: Path, rows: list[Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(made / "run", "test")
    export(made / "run", made / "snapshot", dtype="fp32", attention_dtype="fp32", parity_requests=0)
    snapshot = load_snapshot(made / "snapshot")
    assert snapshot.manifest.tasks == ("bought", "click", "sold")
    batch = snapshot.recorded.batch
    # No table has the domain: the model does not read it, so that requests need not carry it.
    assert batch.task_weight is not None and batch.domain is not None and batch.context is None
    own = made / "run" / "scores-test.parquet"
    score(made / "snapshot", made / "log", "test", 0, tmp_path / "same", own)
    assert "100.00% bit-equal" in capsys.readouterr().out
    # The labels in another order, one of them alone, and no domain.
    bare = [{k: v for k, v in row.items() if k not in ("weight_buy", "label_buy")} for row in rows[6:]]
    facts: dict[str, Any] = {"tasks": ["click"], "context": {}}
    log = write_log(tmp_path / "bare", {"test": bare}, rich=True, **facts)
    score(made / "snapshot", log, "test", 0, tmp_path / "bare.parquet", own)
    said = capsys.readouterr().out
    assert "the log has no label buy: labels of the tasks that need it are NaN" in said
    assert "the log has no feature city: the scores have no domain" in said and "100.00% bit-equal" in said
    table = pq.read_table(tmp_path / "bare.parquet")
    assert np.isnan(table.column("label_sold").to_numpy()).all()
    np.testing.assert_array_equal(
        table.column("label_click").to_numpy(), pq.read_table(own).column("label_click").to_numpy()
    )


def test_a_run_goes_on_with_its_tasks_only(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"tasks\.sold\.mask = 'click == 1', now it is 'click == 0'"):
        trained(config(made / "log", tasks__sold__mask="click == 0", train__max_steps=4), made / "run")
    trained(config(made / "log", tasks__click__weight=3.0, train__max_steps=4), made / "run")
    assert "tasks.click.weight = 3.0 (was 2.0)" in capsys.readouterr().out


def test_a_run_with_other_tasks_starts_from_the_tables_and_heads_of_this(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {**SETTINGS, "data.log": str(made / "log"), "train.max_steps": 1, "train.learning_rate": 1e-12}
    words |= {"train.init_from": str(made / "run"), "tasks.buy.weight": 1.0, "tasks.click.weight": 1.0}
    given = load_config(Path("configs/dare.toml"), overrides(words)[1::2])
    trained(given, tmp_path / "run")
    said = capsys.readouterr().out
    assert "tasks: buy not there before, with first weights of their own" in said
    assert "tasks: bought, sold left out" in said
    old, new = parameters(made / "run"), parameters(tmp_path / "run")
    head = [name for name in new if "head.layers" in name and name.endswith(".weight")]
    last = max(head, key=lambda name: int(name.split(".")[-2]))
    assert new[last].shape[0] == 2 and old[last].shape[0] == 3
    assert torch.allclose(new[last][1], old[last][1], atol=1e-9)
    assert not torch.allclose(new[last][0], old[last][0], atol=1e-3)


def test_a_log_without_a_label_that_a_task_needs_trains_nothing(rows: list[Row], tmp_path: Path) -> None:
    bare = [{k: v for k, v in row.items() if k not in ("weight_buy", "label_buy")} for row in rows]
    log = write_log(tmp_path / "log", {"train": bare}, rich=True, tasks=["click"])
    with pytest.raises(ConfigError, match=r"tasks\.bought\.label = 'buy': the log has no such label"):
        trained(config(log), tmp_path / "run")
