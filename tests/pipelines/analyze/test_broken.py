"""Runs of which not everything can be measured: the report says what is missing, and has the rest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from pipelines.analyze.entanglement import _apart, _Found
from pipelines.analyze.options import AnalyzeOptions
from pipelines.analyze.report.model import Section
from pipelines.analyze.runs import open_runs
from pipelines.analyze.sections import chosen
from tests.helpers.logs import small_log
from tests.helpers.snapshots import Change, save_run
from trainer.analysis.entanglement import Space
from trainer.ranks.process_group import process_group


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("log") / "log")


def sections(run: Path, *names: str, sample: int = 40) -> dict[str, Section]:
    with process_group(device="cpu", alone=True) as ranks:
        options, runs = AnalyzeOptions(sample=sample), open_runs([run], ranks)
        return {name: analyse(runs, options) for name, analyse in chosen(names).items()}


def filled(value: float, rows: slice) -> Change:
    def change(weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            if "attention__" in name:
                weight[rows] = value

    return change


def test_a_sample_without_a_user_leaves_sections_empty(log: Path, tmp_path: Path) -> None:
    found = sections(save_run(tmp_path / "run", log), "search", "entanglement", "gradients", sample=1)
    assert all(section.skipped for section in found.values())
    assert not found["search"].figures and "raise --sample" in found["search"].skipped[0]


def test_rows_of_nan_are_an_alarm_and_not_measured(log: Path, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", log, change=filled(float("nan"), slice(None)))
    found = sections(run, "collapse", "entanglement", "gradients", "search", "quality")
    assert {finding.level for finding in found["collapse"].findings} == {"alarm"}
    assert sum("all of its rows hold NaN" in text for text in found["collapse"].skipped) == 2
    for name in ("entanglement", "gradients", "search", "quality"):
        assert any("holds NaN or infinity; analyze an earlier" in text for text in found[name].skipped), name


def test_a_table_of_zeros_has_collapsed_and_no_direction(log: Path, tmp_path: Path) -> None:
    found = sections(save_run(tmp_path / "run", log, change=filled(0.0, slice(None))), "collapse")["collapse"]
    alarms = [finding.text for finding in found.findings if finding.level == "alarm"]
    assert len(alarms) == 2 and all(text.endswith("all of them are zero.") for text in alarms)


def test_metrics_that_end_in_half_a_letter_are_read_up_to_there(log: Path, tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", log)
    line = '{"step": 1, "split": "train", "loss": 0.5, "note": "\u2028"}\n'
    (run / "metrics.jsonl").write_bytes(line.encode() + b'{"step": 2, "split": "tr\xc3')
    with process_group(device="cpu", alone=True) as ranks:
        assert [entry["step"] for entry in open_runs([run], ranks)[0].metrics] == [1]


def test_a_task_that_is_part_of_another_is_never_alone() -> None:
    rng = np.random.default_rng(3)
    space = {name: Space(*rng.normal(size=(2, 9, 4))) for name in ("attention", "representation")}
    click = np.array([1, 1, 1, 0, 0, 0, 1, 1, 0], dtype=np.float32)
    for conversion, sentences in ((click * [1, 0, 1, 0, 0, 0, 0, 1, 0], 0), (1 - click, 1)):
        labels = {"click": click, "conversion": conversion.astype(np.float32)}
        nothing = np.zeros(9, np.int64)
        found = _Found(space, {}, labels, nothing, nothing, str)
        texts = [finding.text for finding in _apart("run", found, "")]
        assert len(texts) == sentences and not any("nan" in text for text in texts)
