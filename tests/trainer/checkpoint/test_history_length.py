"""A run that is read at another history length than it was trained at."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from embeddings.errors import ConfigError
from pipelines.evaluate import evaluate
from tests.helpers.models import preset
from tests.helpers.snapshots import exported, save_run
from tests.trainer.test_presets import preset_log
from trainer.checkpoint.history_length import at_length
from trainer.log.schema import read_manifest
from trainer.run_folder import RunFolder
from trainer.snapshot import load_snapshot

TRAINED, READ = 12, 40


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preset_log(tmp_path_factory.mktemp("lengths") / "log")


def test_a_model_without_ranks_scores_as_one_of_the_longer_history(log: Path, tmp_path: Path) -> None:
    """The scores are those of the same weights in a run of that length, kept under their own names."""
    run, twin = tmp_path / "run", tmp_path / "twin"
    save_run(run, log, "stca")
    save_run(twin, log, "stca", f"data.history_length={READ}")
    (short, longer), wanted = (
        [evaluate(run, "validation", history_length=length) for length in (0, READ)],
        evaluate(twin, "validation"),
    )
    assert longer["auc"] == wanted["auc"] and longer["logloss"] == wanted["logloss"] != short["logloss"]
    summary = RunFolder(run).read_summary()
    assert summary["validation"]["logloss"] == short["logloss"]
    assert summary[f"validation_at_{READ}"]["logloss"] == longer["logloss"]
    assert (run / f"scores-validation-at-{READ}.parquet").is_file()
    version = exported(run, tmp_path / "snap", history_length=READ)
    assert load_snapshot(version).manifest.config.data.history_length == READ


@pytest.mark.parametrize(
    ("name", "override", "weight"),
    [
        ("longer", "model.position=true", "branches.main.sequence.time.tables.position"),
        ("dare", "model.position=true", "branches.main.sequence.time.tables.position"),
        ("td_sasrec", "model.search=dot", "branches.main.sequence.position"),
    ],
)
def test_a_weight_for_each_place_of_the_history_refuses(
    name: str, override: str, weight: str, log: Path
) -> None:
    config, manifest = preset(name, log, override), read_manifest(log)
    assert at_length(config, manifest, 0) is config and at_length(config, manifest, TRAINED) is config
    words = rf"--history-length {READ}: {re.escape(weight)} has a row for each of the 12 places"
    with pytest.raises(ConfigError, match=words):
        at_length(config, manifest, READ)


@pytest.mark.parametrize("name", ["stca", "td_sasrec", "longer"])
def test_ages_and_the_newest_behaviors_alone_know_no_length(name: str, log: Path) -> None:
    config = preset(name, log, "model.position=false")
    assert at_length(config, read_manifest(log), READ).data.history_length == READ
