"""Validations of a sample: said at the start and in files, the same each time, the whole split in the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embeddings.errors import DataError
from pipelines.evaluate import evaluate
from pipelines.score import refuse_sample
from pipelines.train import train
from tests.helpers.launching import SETTINGS
from tests.helpers.logs import Shape, random_rows, write_log
from trainer.quality.scored import read_scores

CONFIG = Path("configs/dare.toml")


def test_validations_of_a_sample_say_so_and_are_the_same_each_time(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    validation = random_rows(2, Shape(users=30))
    splits = {"train": random_rows(1, Shape(users=20)), "validation": validation, "test": validation[:9]}
    log, run = write_log(tmp_path / "log", splits), tmp_path / "run"
    settings = {
        **SETTINGS,
        "data.log": str(log),
        "train.validate_every": 2,
        "train.max_steps": 4,
        "train.validate_candidates": 60,
        "train.early_stopping.patience": 9,
    }
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    train(CONFIG, run, words)
    total = sum(row["num_candidates"] for row in validation)
    said = capfd.readouterr().out
    assert f"validation: about 60 of {total:,} candidates, those of" in said
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    sampled = [line["sampled"] for line in lines if line["split"] == "validation"]
    assert len(sampled) == 2 and sampled[0] == sampled[1]
    assert 0 < sampled[0]["candidates"] < total == sampled[0]["of"]
    assert f"validation after step 2 ({sampled[0]['candidates']:,} of {total:,} candidates): AUC" in said
    summary = json.loads((run / "summary.json").read_text())
    assert summary["validation"]["sampled"] == sampled[0]
    assert summary["validation"]["samples"] == sampled[0]["candidates"]
    counts = {(row["users"], row["groups"]) for row in summary["baselines_validation"].values()}
    assert counts == {(summary["validation"]["users"], summary["validation"]["groups"])}
    whole_file, sample_file = (run / f"scores-validation{end}.parquet" for end in ("", "-sample"))
    again = evaluate(run, "validation", sample=60)
    assert not whole_file.exists() and read_scores(sample_file).size == again["samples"]
    with pytest.raises(DataError, match=rf"holds a sample of its split \({again['samples']} of {total} cand"):
        refuse_sample(sample_file)
    assert (again["auc"], again["auc_ci"]) == (summary["validation"]["auc"], summary["validation"]["auc_ci"])
    assert "a sample of the split's" in capfd.readouterr().out
    whole = evaluate(run, "validation")
    assert "sampled" not in whole and whole["samples"] == total == read_scores(whole_file).size
    refuse_sample(whole_file)
    kept = whole_file.read_bytes()
    evaluate(run, "validation", sample=60)
    assert whole_file.read_bytes() == kept
    with pytest.raises(DataError, match="so small that it holds no user"):
        evaluate(run, "validation", sample=1)
    # Another sample is another scale for the best validation.
    train(CONFIG, run, [*words, "train.max_steps=5", "train.validate_candidates=90"])
    assert "validations score other candidates since" in capfd.readouterr().out
