"""Runs as they are analysed: names, labels of seeds, models over a few rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embeddings.errors import ConfigError
from pipelines.analyze.analyze import analyze
from pipelines.analyze.options import AnalyzeOptions
from pipelines.analyze.runs import open_runs
from pipelines.analyze.sections import SECTIONS
from tests.helpers.logs import small_log
from tests.helpers.snapshots import save_run
from trainer.ranks.process_group import process_group


def test_a_run_opens_and_its_model_scores(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", small_log(tmp_path / "log"))
    with process_group(device="cpu", alone=True) as ranks:
        (opened,) = open_runs([run], ranks)
        batches = [step.batch for step in opened.reader("test", candidates=16).steps()]
        scores = torch.cat([opened.model(batches).score(batch) for batch in batches])
        assert scores.shape == (opened.manifest.splits["test"].candidates, len(opened.tasks))
        assert (opened.name, opened.label, opened.seed) == ("run", "run", opened.config.train.seed)
        for _, spec, tensor in opened.tables():
            assert opened.tensors.shape(tensor) == (spec.rows, spec.dim)
        with pytest.raises(ConfigError, match="named twice"):
            open_runs([run, tmp_path / "." / "run"], ranks)


def test_the_verb_writes_a_report_and_replaces_no_other_folder(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", small_log(tmp_path / "log"))
    out = tmp_path / "report"
    report = analyze([run], out, AnalyzeOptions(device="cpu", sample=40))
    assert [section.name for section in report.sections] == [*SECTIONS]
    assert {file.name for file in out.iterdir()} == {"index.html", "report.json", "figures"}
    analyze([run], out, AnalyzeOptions(what=("collapse",), device="cpu"))
    page = (out / "index.html").read_text()
    assert 'id="collapse"' in page and 'id="quality"' not in page
    with pytest.raises(ConfigError, match="is no report"):
        analyze([run], run, AnalyzeOptions(device="cpu"))
    with pytest.raises(ConfigError, match="--what spectra: there is no such section"):
        analyze([run], out, AnalyzeOptions(what=("spectra",), device="cpu"))
