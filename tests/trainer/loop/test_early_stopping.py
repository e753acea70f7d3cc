"""Training that ends where validation no longer gets better, and the checkpoint that it leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pipelines.train
from embeddings.errors import CheckpointError, ConfigError, DataError
from pipelines.evaluate import evaluate
from pipelines.export import export
from tests.helpers.launching import SETTINGS, overrides, tandemrec
from tests.helpers.logs import enrich, random_rows, small_log, write_log
from trainer.checkpoint import files as checkpoint_files
from trainer.config.sections import EarlyStoppingConfig, TrainConfig
from trainer.loop.early_stopping import Best, changed_watch, value_of, watched
from trainer.quality.metrics import Metrics
from trainer.ranks.process_group import process_group
from trainer.run_config import Config, load_config
from trainer.update.schedule import schedule_remarks

CONFIG = Path("configs/dare.toml")
# Nothing gains as much, so that the first validation stays the best: after step 2, with an end after step 6.
STOPPING = {
    "train.validate_every": 2,
    "train.early_stopping.patience": 2,
    "train.early_stopping.min_delta": 1.0,
    "train.epochs": 9,
    "checkpoint.keep": 1,
    "checkpoint.every_steps": 1,
}


def words(log: Path, **changes: Any) -> list[str]:
    named = {k.replace("__", "."): v for k, v in changes.items()}
    return overrides({**SETTINGS, "data.log": str(log), **STOPPING, **named})


def config(log: Path, **changes: Any) -> Config:
    return load_config(CONFIG, words(log, **changes)[1::2])


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("early") / "log", seed=1)


@pytest.fixture(scope="module")
def run(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("early") / "run"
    with process_group() as ranks:
        pipelines.train.run(config(log), run, ranks)
    return run


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in checkpoint_files.checkpoints(run / "checkpoints"))


def validated(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["auc"]) for line in lines if line["split"] == "validation"]


def test_training_ends_and_its_best_checkpoint_stays(run: Path) -> None:
    assert [step for step, _ in validated(run)] == [2, 4, 6]
    assert steps(run) == [2, 6]


def test_the_best_is_what_is_measured_and_exported(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = dict(validated(run))
    assert len(set(found.values())) == 3
    for which, step in (("", 2), ("best", 2), ("newest", 6), ("6", 6), ("2", 2)):
        assert evaluate(run, "validation", which)["auc"] == found[step], which
        assert json.loads((run / "summary.json").read_text())["validation_step"] == step
    assert "checkpoint step-00000002" in capfd.readouterr().out
    version = export(run, tmp_path / "snapshots", parity_requests=0)
    assert json.loads((version / "manifest.json").read_text())["step"] == 2
    version = export(run, tmp_path / "snapshots", parity_requests=0, which="newest")
    assert json.loads((version / "manifest.json").read_text())["step"] == 6
    with pytest.raises(CheckpointError, match=r"no checkpoint '5': give newest, best or a step, of 6, 2"):
        evaluate(run, "validation", "5")


def test_a_stop_in_between_changes_nothing(log: Path, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "run"

    def stop(step: int) -> None:
        if step == 4:  # seen in the step after it
            os.kill(os.getpid(), signal.SIGTERM)

    with process_group() as ranks:
        pipelines.train.run(config(log), other, ranks, after_step=stop)
        assert steps(other) == [2, 5]
        pipelines.train.run(config(log), other, ranks)
    assert validated(other) == validated(run) and steps(other) == [2, 6]


def test_the_summary_is_of_the_checkpoint_that_is_taken(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["validation"]["auc"] == dict(validated(run))[2] and summary["validation_step"] == 2


def test_a_run_that_has_nothing_left_stays_as_it_is(
    log: Path, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (run / "config.toml").read_text()
    with process_group() as ranks:
        pipelines.train.run(config(log, train__learning_rate=0.5), run, ranks)
        with pytest.raises(ConfigError, match=r"data.history_length = [0-9]+, now it is 3; set it back"):
            pipelines.train.run(config(log, data__history_length=3), run, ranks)
    assert "nothing left to train" in (said := capfd.readouterr().out)
    assert "raise train.early_stopping.patience for more" in said
    assert "settings that differ from those of step-00000006: train.learning_rate = 0.5 (was " in said
    assert steps(run) == [2, 6] and (run / "config.toml").read_text() == before


def test_two_ranks_end_together(log: Path, tmp_path: Path) -> None:
    done = tandemrec("train", "--config", str(CONFIG), "--out", str(tmp_path / "run"), *words(log), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no better auc of click in 2 validation(s): training ends; best: 0." in done.stdout
    assert "evaluate and export take the best checkpoint, after step 2; what follows" in done.stdout
    assert steps(tmp_path / "run") == [2, 6]


def test_a_damaged_best_checkpoint_is_not_used_unasked(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(run, tmp_path / "run")
    (run / "checkpoints" / "step-00000002" / "state.json").write_text("{}")
    assert evaluate(run, "validation")["auc"] == validated(run)[-1][1]
    assert "refused checkpoint: the best one" in capfd.readouterr().out
    with pytest.raises(CheckpointError, match="cannot be used"):
        evaluate(run, "validation", "best")


def metrics(value: float) -> Metrics:
    blank = dict.fromkeys(Metrics.__dataclass_fields__, 0)
    return replace(Metrics(**blank), auc=value, logloss=value)


def test_what_counts_as_better() -> None:
    def seen(values: list[float], **settings: Any) -> list[bool]:
        given, best = EarlyStoppingConfig(patience=2, **settings), Best()
        return [best.update(given, {"click": metrics(value)}, n) for n, value in enumerate(values)]

    nan = float("nan")
    assert seen([nan, 0.5, nan, 0.6, 0.6]) == [False, True, False, True, False]
    assert seen([0.5, 0.55, 0.61, 0.7], min_delta=0.1) == [True, False, True, False]
    assert seen([0.5, 0.6, 0.4], metric="logloss") == [True, False, True]
    best, given = Best(), EarlyStoppingConfig(patience=2)
    ends = []
    for value in (nan, nan):
        best.update(given, {"click": metrics(value)}, 1)
        ends.append(best.over(given))
    assert ends == [False, True] and not best.over(EarlyStoppingConfig())


def test_a_named_task_or_the_mean_over_tasks_decides() -> None:
    nan = float("nan")
    tasks = {"click": [0.5, 0.6, 0.7], "buy": [0.7, 0.8, 0.6], "like": [nan, nan, nan]}

    def seen(task: str) -> list[bool]:
        given, best = EarlyStoppingConfig(patience=2, task=task), Best()
        each = [{name: metrics(values[n]) for name, values in tasks.items()} for n in range(3)]
        return [best.update(given, one, n) for n, one in enumerate(each)]

    assert seen("") == seen("click") == [True, True, True]
    assert seen("buy") == [True, True, False] and seen("like") == [False, False, False]
    # A task whose labels are all alike has no AUC, and is no part of the mean.
    assert seen("*") == [True, True, False]
    first = {name: metrics(values[0]) for name, values in tasks.items()}
    assert value_of(EarlyStoppingConfig(task="*"), first) == pytest.approx(0.6)
    for name, hint in (("buyy", "did you mean 'buy'?"), ("x", 'one of click, buy, like, or "*" for the')):
        with pytest.raises(ConfigError, match=re.escape(hint)):
            watched(EarlyStoppingConfig(task=name), list(tasks))


def test_an_unknown_task_is_refused_before_the_first_step(tmp_path: Path, log: Path) -> None:
    given = words(log, train__early_stopping__task="clack")[1::2]
    with pytest.raises(ConfigError, match=r"task = 'clack': no such task; did you mean 'click'\?"):
        pipelines.train.check(CONFIG, tmp_path / "run", given)


def test_a_task_that_validation_does_not_observe_cannot_be_watched(tmp_path: Path) -> None:
    """It would never get better, and training would end as soon as patience allows."""
    rows = {"train": enrich(random_rows(5), 5), "validation": enrich(random_rows(6), 6)}
    for row in rows["validation"]:
        row["label_buy"] = [[None for _ in labels] for labels in row["label_buy"]]
    log = write_log(tmp_path / "log", rows, rich=True, partial=["buy"])
    given = words(log, train__early_stopping__task="buy")[1::2]
    with pytest.raises(ConfigError, match="watches buy, and no candidate of the validation split has its"):
        pipelines.train.check(CONFIG, tmp_path / "run", given)
    pipelines.train.check(CONFIG, tmp_path / "run", words(log, train__early_stopping__task="*")[1::2])


def test_the_best_means_nothing_where_another_task_is_watched() -> None:
    def changed(before: dict[str, Any], now: dict[str, Any], tasks: dict[str, Any] | None = None) -> str:
        earlier = {"train": {"early_stopping": {"patience": 2, **before}}, "tasks": tasks or {}}
        return changed_watch(earlier, EarlyStoppingConfig(**{"patience": 2, **now}), ["click", "buy"])

    assert changed({}, {}) == changed({}, {"task": "click"}) == changed({"task": "*"}, {"task": "*"}) == ""
    assert changed({"task": "click"}, {"task": "buy"}) == "train.early_stopping watched click"
    assert changed({"task": "*"}, {}) == "train.early_stopping watched click and buy"
    # The first task is another one since.
    assert changed({}, {}, {"buy": {}, "click": {}}) == "train.early_stopping watched buy"
    assert changed({}, {"metric": "gauc"}) == "train.early_stopping.metric was auc"
    assert changed({}, {"patience": 0}) == "train.early_stopping is off now"


def test_it_needs_validations(tmp_path: Path, log: Path) -> None:
    with pytest.raises(ConfigError, match=r"set train.validate_every to the steps"):
        config(log, train__validate_every=0)
    bare = write_log(tmp_path / "log", {"train": random_rows(1)})
    with pytest.raises(ConfigError, match=r"train.early_stopping needs validation requests"):
        pipelines.train.check(CONFIG, tmp_path / "run", words(bare)[1::2])


def state(run: Path, step: int) -> dict[str, Any]:
    return checkpoint_files.read_state(run / "checkpoints" / checkpoint_files.final_name(step))


def test_the_last_checkpoint_knows_of_the_last_validation(log: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # The validation at the end is due by nothing else, and a save after the last step is due, too.
    with process_group() as ranks:
        pipelines.train.run(config(log, train__epochs=1, train__validate_every=1000), run, ranks)
    end = steps(run)[-1]
    assert validated(run)[-1][0] == end
    assert state(run, end)["validated"] == state(run, end)["best"]["step"] == end


def test_another_metric_has_no_best_yet(
    log: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, changes, said in (
        ("metric", {"train__early_stopping__metric": "logloss"}, "train.early_stopping.metric was auc"),
        ("off", {"train__early_stopping__patience": 0, "train__max_steps": 7}, "is off now"),
    ):
        other = tmp_path / name
        shutil.copytree(run, other)
        with process_group() as ranks:
            pipelines.train.run(config(log, **changes), other, ranks)
        assert f"{said}: the best validation so far, after step 2," in capfd.readouterr().out.replace(
            "train.early_stopping is off now", "is off now"
        )
        best = state(other, steps(other)[-1])["best"]
        assert best["step"] > 6 if name == "metric" else best["step"] == -1


def test_a_start_that_was_killed_before_its_summary_is_summed_up(
    log: Path, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other)
    (other / "summary.json").unlink()
    with process_group() as ranks:
        pipelines.train.run(config(log), other, ranks)
        now = json.loads((other / "summary.json").read_text())
        assert now["steps"] == 6 and now["validation"]["auc"] == dict(validated(run))[2]
        assert now["validation_step"] == 2
        assert "nothing left to train" not in capfd.readouterr().out
        (other / "summary.json").write_text("[1]")
        with pytest.raises(DataError, match=r"is no JSON object; move it away"):
            pipelines.train.run(config(log), other, ranks)


def test_stopping_that_can_never_happen_is_said() -> None:
    given = {"early_stopping": {"patience": 3}, "max_steps": 500}
    for every, told in ((100, False), (200, True)):
        lines = schedule_remarks(TrainConfig(validate_every=every, **given), 100_000, 200)
        found = [line for line in lines if line.startswith("train.early_stopping cannot end this run early")]
        assert bool(found) == told, lines
