"""What a person and a script are told of quality: every task, everywhere, and plainly where it is bad."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from embeddings.errors import DataError
from pipelines.quality_report import remarks, shown_rank, slices_table, task_table
from tests.helpers.launching import ROOT, SETTINGS, overrides, tandemrec
from tests.helpers.logs import Row, Shape, enrich, random_rows, write_log
from trainer.quality.compare import compare_scores
from trainer.quality.domains import SplitMetrics
from trainer.quality.metrics import Metrics, measure
from trainer.quality.scored import Scored, read_scores, write_scores

TASKS = ("click", "buy")


def rows(seed: int, users: int = 12) -> list[Row]:
    return enrich(random_rows(seed, Shape(users=users)), seed)


def trained(log: Path, run: Path) -> str:
    """What training says."""
    words = ["train", "--config", str(ROOT / "configs/dare.toml"), "--out", str(run)]
    done = tandemrec(*words, *overrides({**SETTINGS, "data.log": str(log), "train.max_steps": 4}))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log with two tasks, a run, and what train and evaluate said (`*.txt`)."""
    folder = tmp_path_factory.mktemp("quality")
    log = write_log(
        folder / "log", {"train": rows(1), "validation": rows(2, 8), "test": rows(3, 8)}, rich=True
    )
    (folder / "train.txt").write_text(trained(log, folder / "run"), encoding="utf-8")
    done = tandemrec("evaluate", "--run", str(folder / "run"))
    assert done.returncode == 0, done.stderr
    (folder / "evaluate.txt").write_text(done.stdout, encoding="utf-8")
    return folder


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
    return found


def test_summary_holds_every_task_in_one_shape(made: Path) -> None:
    """Wherever metrics stand: those of the first task as ever, and under `tasks` those of each by name."""
    found = summary(made)
    entries = [found["validation"], found["test"]]
    for key in ("baselines", "baselines_validation", "test_by_history"):
        assert found[key]
        entries += found[key].values()
    for entry in entries:
        assert list(entry["tasks"]) == list(TASKS)
        assert {name: value for name, value in entry.items() if name != "tasks"} == entry["tasks"]["click"]
        assert {"auc", "gauc"} <= entry["tasks"]["buy"].keys()
    test = found["test"]
    assert test["auc"] != test["tasks"]["buy"]["auc"] and test["logloss"] != test["tasks"]["buy"]["logloss"]
    lead = found["baselines"]["item_rate"]["tasks"]["buy"]
    assert lead["auc_lead"] == pytest.approx(test["tasks"]["buy"]["auc"] - lead["auc"])
    assert lead["auc_lead_ci"] > 0


def test_scores_are_named_by_task_and_are_what_was_measured(made: Path) -> None:
    file = made / "run" / "scores-test.parquet"
    named = [f"{what}_{task}" for task in TASKS for what in ("score", "label")]
    names = pq.read_schema(file).names
    # The labels of this log have sample weights.
    weights = [f"weight_{task}" for task in TASKS]
    assert names == ["user_id", "request_id", "candidate", "item_id", "history", *named, *weights]
    scored = read_scores(file)
    assert scored.tasks == TASKS
    for task, metrics in scored.all_metrics().items():
        assert metrics.as_dict() == pytest.approx(summary(made)["test"]["tasks"][task])


def test_every_task_is_validated_during_training(made: Path) -> None:
    lines = [json.loads(line) for line in (made / "run" / "metrics.jsonl").read_text().splitlines()]
    validation = [line for line in lines if line["split"] == "validation"]
    assert validation and all(list(line["tasks"]) == list(TASKS) for line in validation)
    last = {name: value for name, value in validation[-1].items() if name not in ("step", "split")}
    assert last == summary(made)["validation"]
    board = EventAccumulator(str(made / "run" / "tensorboard"))
    board.Reload()
    for task in TASKS:
        (event,) = board.Scalars(f"validation/{task}/auc")
        assert event.value == pytest.approx(last["tasks"][task]["auc"])
    assert board.Scalars("validation/auc")[0].value == pytest.approx(last["auc"])


def test_train_ends_with_what_to_do_next(made: Path) -> None:
    said = (made / "train.txt").read_text(encoding="utf-8").splitlines()
    assert said[-2:] == [
        f"curves: tensorboard --logdir {made / 'run'}",
        f"next:   tandemrec evaluate --run {made / 'run'}",
    ]
    at = next(place for place, line in enumerate(said) if line.startswith("validation after step 4"))
    head, click, buy = said[at + 1 : at + 4]
    assert head.split() == ["task", "AUC", "GAUC", "logloss", "PCOC"] and len(head) == len(click) == len(buy)
    assert click.split()[0] == "click" and buy.split()[0] == "buy" and " 0." in click
    assert not any("no validation" in line or "no test" in line for line in said)


def test_evaluate_prints_every_task_beside_its_baselines(made: Path) -> None:
    said = (made / "evaluate.txt").read_text(encoding="utf-8")
    found = summary(made)["test"]
    for task in TASKS:
        own = found["tasks"][task]
        (table,) = (part for part in said.split("\n\n") if part.startswith(f"{task}  "))
        assert f"{own['auc']:.4f} ± {own['auc_ci']:.4f}" in table.splitlines()[2]
        for name in ("mean label", "item rate", "user + item rate", "item popularity", "own past count of"):
            assert f"\n{name}" in table
        assert f"\n\n{task}, by behaviors seen" in said
    assert max(map(len, said.split("\n\n")[1].splitlines())) <= 120


def test_export_and_score_know_every_task(made: Path) -> None:
    exact = ["--attention-dtype", "fp32"]
    done = tandemrec("export", "--run", str(made / "run"), "--out", str(made / "snapshot"), *exact)
    assert done.returncode == 0, done.stderr
    for task in TASKS:
        value = summary(made)["validation"]["tasks"][task]["auc"]
        assert f"AUC of {task} {value:.6f} by the trainer, {value:.6f} by the snapshot" in done.stdout
    old = made / "old.parquet"
    table = pq.read_table(made / "run" / "scores-test.parquet")
    # `score` writes no sample weights, and files with numbers for tasks are older than these.
    table = table.drop_columns([f"weight_{task}" for task in TASKS])
    numbered = {
        f"{what}_{task}": f"{what}_{t}" for t, task in enumerate(TASKS) for what in ("score", "label")
    }
    pq.write_table(table.rename_columns([numbered.get(name, name) for name in table.column_names]), old)
    words = ["--snapshot", str(made / "snapshot"), "--requests", str(made / "log")]
    for against in (made / "run" / "scores-test.parquet", old):
        out = made / "scores.parquet"
        done = tandemrec("score", *words, "--out", str(out), "--against", str(against))
        assert done.returncode == 0, done.stderr
        assert "own scores: 0 (100.00% bit-equal" in done.stdout
    assert pq.read_table(made / "scores.parquet").equals(table)


def test_an_empty_split_is_said(tmp_path: Path) -> None:
    """Neither a KeyError nor silence: in train, evaluate, export and score."""
    log, run = write_log(tmp_path / "log", {"train": rows(1)}, rich=True), tmp_path / "run"
    said = trained(log, run)
    assert "the log has no test requests" in said
    assert "the log has no validation requests: nothing is measured while training" in said
    assert said.splitlines()[-1].endswith(f"tandemrec evaluate --run {run} --split train")
    words = ["--check", "--config", str(ROOT / "configs/dare.toml"), "--out", str(tmp_path / "new"), "--set"]
    done = tandemrec("train", *words, f"data.log={json.dumps(str(log))}")
    assert done.returncode == 0 and "the log has no validation requests" in done.stdout
    done = tandemrec("evaluate", "--run", str(run))
    assert done.returncode == 2 and "--split test: the log has requests in train;" in done.stderr
    done = tandemrec("export", "--run", str(run), "--out", str(tmp_path / "snapshot"))
    assert done.returncode == 0 and "no validation requests: scores are compared on training" in done.stdout
    words = ["--snapshot", str(tmp_path / "snapshot"), "--requests", str(log)]
    done = tandemrec("score", *words, "--out", str(tmp_path / "scores.parquet"))
    assert done.returncode == 2 and "--split test: the log has requests in train;" in done.stderr


def test_a_task_of_one_class_is_measured_as_far_as_it_can_be(tmp_path: Path) -> None:
    # The item alone decides on a click, which four steps cannot learn; nobody buys after training.
    train, later = (
        [{**row, "label_click": [[i % 2.0 for i in ids] for ids in row["candidate_item_id"]]} for row in some]
        for some in (rows(1, 40), rows(2, 6))
    )
    never = [{**row, "label_buy": [[0.0] * len(part) for part in row["label_buy"]]} for row in later]
    log = write_log(tmp_path / "log", {"train": train, "validation": never, "test": never}, rich=True)
    reason = "buy: AUC, GAUC, HR, NDCG and NE are empty, since all labels are 0"
    said = trained(log, tmp_path / "run")
    assert re.search(r"^  buy +- +- +0\.", said, re.MULTILINE) and said.count(reason) == 1
    done = tandemrec("evaluate", "--run", str(tmp_path / "run"))
    assert done.returncode == 0 and done.stdout.count(reason) == 1 and "nan" not in done.stdout
    for split, lines in (("validation", said), ("test", done.stdout)):
        lost = rf"\n{split}, click: the trained model loses to `.*item rate`: AUC 0\.[0-9]* against 1\.0"
        assert re.search(lost, lines), lines
        assert "\nwhat may help: more steps" in lines
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["test"]
    assert found["auc"] > 0 and found["tasks"]["buy"]["auc"] is None and found["tasks"]["buy"]["ne"] is None
    assert found["tasks"]["buy"]["logloss"] > 0 and found["tasks"]["buy"]["positives"] == 0


def scored(score: list[list[float]], tasks: tuple[str, ...]) -> Scored:
    n, ids = len(score), np.arange(len(score))
    label = np.zeros((n, len(tasks)), dtype=np.float32)
    return Scored(np.array(score, dtype=np.float32), label, ids, ids, ids * 0, ids, ids, tasks)


def test_tasks_are_compared_by_name() -> None:
    one = scored([[0.25, 0.5], [0.75, 1.0]], ("click", "buy"))
    turned = scored([[0.5, 0.25], [1.0, 0.75]], ("buy", "click"))
    assert compare_scores(one, turned) == (0.0, 1.0)
    assert compare_scores(one, scored([[0.25, 0.5], [0.75, 1.0]], ())) == (0.0, 1.0)
    for other in (("click", "like"), ("click",)):
        with pytest.raises(DataError, match="cannot be compared with those of click, buy"):
            compare_scores(one, scored([[0.5] * len(other)] * 2, other))


def test_scores_are_found_by_the_candidates_names() -> None:
    """In whatever order; a candidate that is missing is an infinite difference, and so is nothing at all."""
    score = np.random.default_rng(0).uniform(size=(40, 1)).tolist()
    whole = scored(score, ("click",))
    order = np.random.default_rng(1).permutation(40)
    assert compare_scores(whole.part(order[:25]), whole.part(order[::-1])) == (0.0, 1.0)
    for some, everything in (
        (whole, whole.part(order[1:])),
        (whole.part(order[:0]), whole),
        (whole, whole.part(order[:0])),
    ):
        assert compare_scores(some, everything) == (math.inf, 0.0)
    moved = scored([[value + (i == 7) / 4] for i, (value,) in enumerate(score)], ("click",))
    assert compare_scores(moved, whole) == (pytest.approx(0.25), 39 / 40)


def test_a_file_without_scores_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "scores.parquet"
    write_scores(scored([[0.5]], ("click",)), whole)
    table = pq.read_table(whole)
    for dropped, problem in (("score_click", "no column is called score_<task>"), ("label_click", "label")):
        pq.write_table(table.drop_columns([dropped]), tmp_path / "part.parquet")
        with pytest.raises(DataError, match=problem):
            read_scores(tmp_path / "part.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "part.parquet")
    with pytest.raises(DataError, match="holds no scores"):
        read_scores(tmp_path / "part.parquet")


def measured(scale: float = 1.0, width: int = 4) -> Metrics:
    """A model that knows nothing, of 200 requests; one candidate in four is positive."""
    rng = np.random.default_rng(0)
    label = (np.arange(200 * width) % 4 == 0).astype(float)
    score = np.clip(0.25 * scale * rng.uniform(0.8, 1.2, label.size), 0, 1)
    return measure(score, label, np.arange(label.size) // width, np.arange(label.size) // (width * 4))


BETTER = {"auc": 0.8, "auc_ci": 0.01, "gauc": 0.7, "auc_lead": -0.3, "auc_lead_ci": 0.02}
WORSE = {"auc": 0.2, "auc_ci": 0.01, "gauc": 0.2, "auc_lead": 0.3, "auc_lead_ci": 0.02}


def test_a_model_that_loses_is_told_so_with_both_values() -> None:
    own = measured()
    table = {"popularity": WORSE, "item_rate": BETTER, "mean_label": {**WORSE, "logloss": 0.1}}
    said = remarks(
        "test", SplitMetrics({"click": own, "buy": own}), {"click": {"popularity": WORSE}, "buy": table}, "c"
    )
    assert said[:2] == [
        f"test, buy: the trained model loses to `item rate`: AUC {own.auc:.4f} against 0.8000 "
        f"({own.auc - 0.8:+.4f} ± 0.0200), GAUC {own.gauc:.4f} against 0.7000",
        f"test, buy: the trained model loses to `mean label`: logloss {own.logloss:.4f} against 0.1000",
    ]
    assert len(said) == 3 and said[2].startswith("what may help: more steps (train.epochs")
    assert remarks("test", SplitMetrics({"click": own}), {"click": {"popularity": WORSE}}, "c") == []
    even = {"auc": own.auc + 0.01, "auc_lead": -0.01, "auc_lead_ci": 0.02}
    (first, _) = remarks("test", SplitMetrics({"click": own}), {"click": {"popularity": even}}, "c")
    assert first.startswith("test, click: the trained model is no better than `item popularity`: AUC")
    # Without the model's scores the interval is that of two independent values.
    near = {"gauc": own.gauc + 0.001, "gauc_ci": 0.01, "logloss": own.logloss - 0.001}
    told = remarks("validation", SplitMetrics({"click": own}), {"click": {"item_rate": near}}, "c")
    half = math.hypot(own.gauc_ci, 0.01)
    assert told[0] == (
        f"validation, click: the trained model is no better than `item rate`: GAUC {own.gauc:.4f} against "
        f"{own.gauc + 0.001:.4f} (-0.0010 ± {half:.4f})"
    )
    far = {"logloss": own.logloss - 0.1, "logloss_lead_ci": 0.05}
    told = remarks("test", SplitMetrics({"click": own}), {"click": {"item_rate": far}}, "c")
    assert "loses to `item rate`: logloss" in told[0] and told[0].endswith("(+0.1000 ± 0.0500)")


def test_predictions_out_of_scale_are_told() -> None:
    for scale, told in ((1.0, False), (1.2, False), (2.47, True), (0.4, True)):
        own = measured(scale)
        said = remarks("validation", SplitMetrics({"click": own}), {"click": {}}, "c")
        assert bool(said) == told, (scale, said)
        if told:
            assert said[0] == (
                f"validation, click: PCOC is {own.pcoc:.2f}: the predictions add up to {own.pcoc:.2f} times "
                "the labels"
            )


def test_what_the_weights_of_the_loss_shift_is_no_warning() -> None:
    table = {"click": {"item_rate": {"logloss": 0.1, "logloss_lead_ci": 0.05}}}
    own = replace(measured(1.6), pcoc_weighted=1.04)
    (said,) = remarks("test", SplitMetrics({"click": own}), table, "c")
    assert said == (
        "test, click: the loss's weights (e.g. of repeated exposures) shift predictions: "
        f"PCOC is {own.pcoc:.2f}, weighted PCOC is 1.04"
    )
    domains = {name: {"click": own} for name in "ab"}
    assert remarks("test", SplitMetrics({"click": own}, domains), table, "c") == [said]
    # Weights explain neither an order that is worse, nor a scale that they do not mend.
    better = {"click": {"item_rate": {**BETTER, **table["click"]["item_rate"]}}}
    lost = remarks("test", SplitMetrics({"click": own}), better, "c")[1]
    assert "loses to `item rate`: AUC" in lost and "logloss" not in lost
    for weighted in (1.5, math.nan):
        told = remarks("test", SplitMetrics({"click": replace(own, pcoc_weighted=weighted)}), table, "c")
        assert "loses to `item rate`: logloss" in told[0] and "PCOC is" in told[1] and len(told) == 3
    fits = replace(measured(), pcoc_weighted=1.0)
    assert "logloss" in remarks("test", SplitMetrics({"click": fits}), table, "c")[0]


def test_an_empty_metric_and_its_reason_are_told_once_for_all_tasks() -> None:
    single = measured(width=1)
    said = remarks("test", SplitMetrics({"click": single, "buy": single}), {"click": {}, "buy": {}}, "c")
    assert said == ["test, click and buy: GAUC, HR and NDCG are empty, since no request holds both classes"]
    lines = task_table("click", single, {}, "c")
    assert lines[2].split()[5:7] == ["-", f"{single.gauc_user:.4f}"] and math.isnan(single.gauc)


def test_tables_show_the_rank_that_requests_allow() -> None:
    assert [shown_rank(measured(width=width)) for width in (1, 4, 5, 6, 12)] == [1, 1, 1, 5, 10]
    head = task_table("click", measured(width=12), {"item_rate": BETTER}, "c")
    titles = ["click", "AUC", "GAUC", "user GAUC", "HR@10", "NDCG@10", "logloss", "NE", "PCOC", "ECE"]
    assert re.split(" {2,}", head[0]) == titles
    assert head[-1] == "AUC of the trained model less that of item rate: -0.3000 ± 0.0200"
    assert "own" not in slices_table("click", {"0": measured()})[0]
