"""Studies from the command to their files."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

import pipelines.train
from embeddings.errors import ConfigError
from pipelines.tune.best import best_toml
from pipelines.tune.plan import read_plan
from pipelines.tune.study import SharedStudy, Validation
from pipelines.tune.tune import TuneOptions, tune
from pipelines.tune.worker import work
from tests.helpers.logs import Shape, random_rows, small_log, write_log
from tests.helpers.studies import BUDGET, CONFIG, RATES, STUDY, given, rows_of, space_in
from trainer.run_config import load_config
from trainer.run_folder import RunFolder
from trainer.storage import place


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without the files of its test split."""
    folder = small_log(tmp_path_factory.mktemp("tune") / "log", seed=1)
    shutil.rmtree(folder / "test")
    return folder


@pytest.fixture(scope="module")
def study(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune") / "study"
    space = space_in(folder.parent, STUDY, BUDGET, RATES)
    tune(CONFIG, TuneOptions(folder, space, trials=3), given(log))
    return folder


def test_the_best_file_is_the_config_of_the_best_trial(study: Path) -> None:
    found = json.loads((study / "study.json").read_text())
    best = study / "trials" / f"{found['best']['trial']:04d}"
    assert load_config(study / "best.toml") == RunFolder(best).read_config()
    text = (study / "best.toml").read_text()
    assert text.startswith("# Written by `tandemrec tune` in study.\n# trial ")
    assert "\n# The budget of its trials." in text


def test_the_first_trial_is_the_configuration_as_it_is(study: Path, log: Path, tmp_path: Path) -> None:
    budget = ["train.max_steps=4", "train.validate_every=2"]
    pipelines.train.train(CONFIG, tmp_path / "run", [*given(log), *budget])
    alone = RunFolder(tmp_path / "run").read_summary()
    first = rows_of(study)[0]
    assert first["value"] == alone["validation"]["auc"]
    assert first["steps"] == alone["steps"]


def test_files_of_a_study(study: Path) -> None:
    rows, found = rows_of(study), json.loads((study / "study.json").read_text())
    assert [row["trial"] for row in rows] == [0, 1, 2]
    assert found["best"]["value"] == max(row["value"] for row in rows)
    assert found["lead"] == found["best"]["value"] - rows[0]["value"]
    assert found["states"] == {"complete": 3}
    assert all(row["cpu_s"] > 0 for row in rows)
    kept = [folder.parent.name for folder in study.glob("trials/*/checkpoints")]
    assert kept == [f"{found['best']['trial']:04d}"]
    assert (study / "study.png").read_bytes().startswith(b"\x89PNG")


def test_more_trials_go_on_with_a_study(study: Path, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = rows_of(study)
    tune(CONFIG, TuneOptions(study, study.parent / "space.toml", trials=4), given(log))
    assert rows_of(study)[:3] == before
    said = capsys.readouterr().out
    assert said.startswith("trial 3: train.learning_rate ")
    assert "(as it is)" in said
    assert "a lead of" in said or "none of 3 other trial(s) was better" in said
    tune(CONFIG, TuneOptions(study, study.parent / "space.toml", trials=2), given(log))
    said = capsys.readouterr().out
    assert said.startswith(
        "the study has 4 trials already, more than the 2 asked for: no new one was begun\n"
    )
    assert " of 4 (4 complete): " in said
    assert json.loads((study / "study.json").read_text())["trials"] == 4


def test_a_trial_that_fails_is_told_and_the_study_goes_on(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = '[parameters]\n"groups.*.learning_rate" = { choices = [0.2, 1e38] }\n'
    grid = STUDY.replace("trials = 4", "trials = 2\nsampler = 'grid'")
    space = space_in(tmp_path, grid, BUDGET, wild)
    tune(CONFIG, TuneOptions(tmp_path / "study", space), given(log))
    rows = rows_of(tmp_path / "study")
    assert [row["state"] for row in rows] == ["complete", "failed"]
    assert "is not finite" in rows[1]["reason"]
    assert "no other trial is complete" in capsys.readouterr().out


def test_a_study_of_failures_says_so(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wild = '[parameters]\n"groups.*.learning_rate" = { choices = [1e38, 2e38] }\n'
    grid = STUDY.replace("trials = 4", "trials = 2\nsampler = 'grid'")
    space = space_in(tmp_path, grid, BUDGET, wild)
    with pytest.raises(
        ConfigError,
        match=r"no trial of 2 is complete \(2 failed\); the first reason: step.* see .*train\.log",
    ):
        tune(CONFIG, TuneOptions(tmp_path / "study", space), given(log))
    reasons = [row["reason"] for row in rows_of(tmp_path / "study")]
    assert not any(reason in capsys.readouterr().out for reason in reasons)
    assert reasons[1] in (tmp_path / "study" / "trials" / "0001" / "train.log").read_text()
    assert not (tmp_path / "study" / "best.toml").exists()


def test_a_config_error_ends_the_study_at_once(log: Path, tmp_path: Path) -> None:
    wrong = '[parameters]\ngroups.attention.features = { choices = [["nothing"], ["nowhere"]] }\n'
    space = space_in(tmp_path, STUDY, BUDGET, wrong)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"nothing|nowhere"):
            tune(CONFIG, TuneOptions(tmp_path / "study", space), given(log))
    # Taken up by the second start, and left open by it.
    journal = (tmp_path / "study" / "journal.jsonl").read_text()
    assert journal.count('"op_code":4,') == 1
    assert journal.count('"user_attr":{"starts":2}') == 1


def test_a_study_needs_a_validation_split_and_a_folder(log: Path, tmp_path: Path) -> None:
    bare = write_log(tmp_path / "bare", {"train": random_rows(1, Shape())})
    space = space_in(tmp_path)
    with pytest.raises(ConfigError, match="has no validation split"):
        tune(CONFIG, TuneOptions(tmp_path / "study", space), given(bare))
    with pytest.raises(ConfigError, match="a study is a folder that its workers lock"):
        tune(CONFIG, TuneOptions(place("s3://bucket/study"), space), given(log))


def test_a_signal_leaves_a_study_that_the_same_command_goes_on_with(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def report(shared: SharedStudy, seen: Validation) -> bool:
        """Trial 1 is to be pruned, and the process to end, at one step."""
        if shared.number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return shared.number == 1 and not seen.last

    monkeypatch.setattr(SharedStudy, "report", report)
    options = TuneOptions(tmp_path / "a study", space_in(tmp_path), trials=3, storage="")
    tune(CONFIG, options, given(log))
    rows = rows_of(options.out)
    assert [(row["state"], row["steps"]) for row in rows] == [("complete", 4), ("open", 2)]
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith(
        f"next:   tandemrec tune --config {CONFIG} --space {tmp_path}/space.toml --out '"
    )
    assert said[-1].endswith("checkpoint.every_steps=1") and " --trials 3 'data.log=" in said[-1]
    assert not any("tandemrec train" in line for line in said)


def test_the_best_file_is_read_in_any_folder(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        f'extends = "{CONFIG}"\n[plan]\nmapped_folder = "mapped"\n[train]\ninit_from = "s3://b/run"\n'
    )
    changes = {
        "train__validate_every": 3,
        "train__init_from": "former",
        "plan__file": "s3://bucket/plan.json",
    }
    monkeypatch.chdir(log.parent)
    plan = read_plan(own, space_in(tmp_path), given(Path(log.name), **changes))
    (tmp_path / "best.toml").write_text(best_toml(plan, plan.defaults, tmp_path, ["found"]))
    monkeypatch.chdir(tmp_path)
    best = load_config(tmp_path / "best.toml")
    assert best.data.log == log
    assert best.train.init_from == str(log.parent / "former")
    assert best.plan.mapped_folder == str(log.parent / "mapped")
    assert best.plan.file == "s3://bucket/plan.json"
    text = (tmp_path / "best.toml").read_text()
    assert text.index("train.max_steps") > text.index("# The budget") > text.index("train.init_from")
    assert text.index("train.validate_every = 3") > text.index("# The budget")


def test_a_configuration_that_changes_meanwhile_ends_the_study(log: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(f'extends = "{CONFIG}"\n')
    plan = read_plan(own, space_in(tmp_path), given(log))
    own.write_text(f'extends = "{CONFIG}"\n[train]\nseed = 3\n')
    (tmp_path / "study").mkdir()
    with pytest.raises(ConfigError, match=r"own\.toml, or what it extends, has changed"):
        work(plan, tmp_path / "study", "")
