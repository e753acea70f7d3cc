"""A run of ESMM's three tasks in domains, one masked: what is measured, wherever metrics are told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import pipelines.train
from pipelines.evaluate import evaluate
from pipelines.export import export
from tests.helpers.launching import SETTINGS, overrides
from tests.helpers.logs import Row, Shape, enrich, random_rows, write_log
from trainer.quality.scored import read_scores
from trainer.ranks.process_group import process_group
from trainer.run_config import load_config

TASKS = ("click", "conversion", "buy")
SEVERAL = {
    "tasks.click.weight": 0.5,
    "tasks.conversion.label": "buy",
    "tasks.conversion.mask": "click == 1",
    "tasks.conversion.loss": "none",
    "tasks.buy.product": ["click", "conversion"],
    "data.domain": "city",
    "train.max_steps": 4,
    "train.validate_every": 2,
    "train.early_stopping.patience": 5,
    "train.early_stopping.task": "conversion",
}


def rows(seed: int, users: int = 12) -> list[Row]:
    return enrich(random_rows(seed, Shape(users=users)), seed)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log, a run, a snapshot, and what was said (`*.txt`)."""
    folder = tmp_path_factory.mktemp("tasks")
    splits = {"train": rows(1), "validation": rows(2, 10), "test": rows(3, 16)}
    log = write_log(folder / "log", splits, rich=True)
    words = overrides({**SETTINGS, "data.log": str(log), **SEVERAL})[1::2]
    run = folder / "run"
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch, process_group() as ranks:
        patch.setattr("builtins.print", lambda *parts, **_: said.append(" ".join(map(str, parts))))
        pipelines.train.run(load_config(Path("configs/dare.toml"), words), run, ranks)
    (folder / "train.txt").write_text("\n".join(said), encoding="utf-8")
    return folder


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
    return found


def lines_of(folder: Path, split: str) -> list[dict[str, Any]]:
    text = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if line["split"] == split]


def test_validation_says_a_line_a_task_and_early_stopping_goes_by_the_named_one(made: Path) -> None:
    said = (made / "train.txt").read_text(encoding="utf-8")
    first, last = lines_of(made, "validation")
    for line in (first, last):
        start = said.index(f"validation after step {line['step']}:\n  task ")
        block = said[start:].splitlines()[2:5]
        for task, text in zip(TASKS, block, strict=True):
            own, over = line["tasks"][task], line["over_domains"]["tasks"][task]
            assert text.split()[:2] == [task, f"{own['auc']:.4f}"]
            # Behind the four numbers of the split stands the worst domain, where domains are compared.
            name, compared = over["worst_auc_domain"], over["compared"]
            worst = f"{over['worst_auc']:.4f} of {compared} ({name})".split() if compared > 1 else []
            assert text.split()[5:] == worst
        assert list(line["by_domain"]) == ["0", "1", "2", "3", "4", "5", "6"]
    values = [line["tasks"]["conversion"]["auc"] for line in (first, last)]
    best = first if values[0] >= values[1] else last
    assert summary(made)["validation_step"] == best["step"]
    assert summary(made)["validation"] == {k: v for k, v in best.items() if k not in ("step", "split")}
    assert "city" not in said.split("not used: ", 1)[1].splitlines()[0]


def test_evaluate_and_export_know_tasks_masks_and_domains(
    made: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    entry = evaluate(made / "run", "test")
    said, found = capfd.readouterr().out, summary(made)
    assert found["test"]["tasks"].keys() == found["test"]["over_domains"]["tasks"].keys() == set(TASKS)
    scored, file = read_scores(made / "run" / "scores-test.parquet"), made / "run" / "scores-test.parquet"
    assert pq.read_schema(file).names[5] == "domain" and scored.tasks == TASKS
    # What was not clicked has no part in conversion, and the domain is the request's city.
    test, places = rows(3, 16), np.lexsort((scored.candidate, scored.request_id, scored.user_id))
    every = [(row, r) for row in test for r, n in enumerate(row["request_num_candidates"]) for _ in range(n)]
    assert places.tolist() == list(range(len(every))) and scored.domain is not None
    # A task without a loss of its own is measured, and so is the product of both.
    np.testing.assert_allclose(scored.score[:, 2], scored.score[:, 0] * scored.score[:, 1], rtol=1e-5)
    assert scored.domain.tolist() == [row["context_city"][r] for row, r in every]
    click = np.concatenate([part for row in test for part in row["label_click"]])
    buy = np.concatenate([part for row in test for part in row["label_buy"]])
    np.testing.assert_array_equal(scored.label[:, 1], np.where(click == 1, buy, np.nan))
    own = entry["tasks"]["conversion"]
    assert own["samples"] == click.sum() and own["positives"] == (click * buy).sum()
    for task, (place, known) in {"click": (0, click >= 0), "conversion": (1, click == 1)}.items():
        for domain, part in entry["by_domain"].items():
            inside = known & (scored.domain == int(domain))
            assert part["tasks"][task] == pytest.approx(
                scored.part(inside).metrics(place).as_dict(), nan_ok=True
            )
    # Rates of the masked task are those of clicked candidates of training.
    train = rows(1)
    clicked = np.concatenate([part for row in train for part in row["label_click"]]) == 1
    bought = np.concatenate([part for row in train for part in row["label_buy"]])
    rates = {"buy": bought.mean(), "conversion": bought[clicked].mean()}
    assert rates["buy"] != pytest.approx(rates["conversion"])
    for task, rate in rates.items():
        label = scored.label[:, TASKS.index(task)]
        loss = found["baselines"]["mean_label"]["tasks"][task]["logloss"]
        y = label[~np.isnan(label)]
        assert loss == pytest.approx(-(y * math.log(rate) + (1 - y) * math.log(1 - rate)).mean(), rel=1e-5)
    strata = found["test_by_balance"]
    # Conversion and buy have the same label, and click is a factor of buy.
    assert list(strata) == ["click/conversion"]
    for pair, parts in strata.items():
        assert sum(part["stratum"]["candidates"] for part in parts.values()) == len(every)
        assert all(list(part["tasks"]) == pair.split("/") for part in parts.values())
        assert {part["stratum"]["counted_in"] for part in parts.values()} == {"train"}
    assert "pairs of tasks" not in said and "\nclick and conversion " in said and "\n\nPCOC by city" in said
    export(made / "run", made / "snapshot")
    said = capfd.readouterr().out
    for task in TASKS:
        (line,) = (line for line in said.splitlines() if line.startswith(f"AUC of {task} "))
        assert f" {found['validation']['tasks'][task]['auc']:.6f} by the trainer" in line
        assert "; largest difference " in line
    why = "since the snapshot's tables of attention are fp16, see --dtype and --attention-dtype"
    assert said.splitlines()[-1] == f"not bit-equal, {why}" and "100.00% bit-equal" not in said
    export(made / "run", made / "exact", attention_dtype="fp32")
    said = capfd.readouterr().out
    assert "100.00% bit-equal" in said and "not bit-equal" not in said
