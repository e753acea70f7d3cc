"""The section on learning curves: seeds are one line, and odd files are said."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipelines.analyze.curves import analyse
from pipelines.analyze.options import AnalyzeOptions
from pipelines.analyze.report.model import Figure, Lines, Section, Table
from pipelines.analyze.runs import AnalysedRun
from trainer.run_folder import RunFolder


def run(folder: Path, label: str, *lines: dict[str, Any], end: str = "") -> AnalysedRun:
    """A run of which only the metrics are there."""
    folder.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + end, encoding="utf-8")
    return cast(AnalysedRun, SimpleNamespace(name=folder.name, label=label, folder=RunFolder(folder)))


def lines_of(*aucs: float, loss: float = 0.5) -> list[dict[str, Any]]:
    reports = [{"step": 10 * n, "split": "train", "loss": loss} for n in range(1, len(aucs) + 1)]
    tasks = [{"click": {"auc": auc, "logloss": 0.3}} for auc in aucs]
    return reports + [{"step": 10 * n, "split": "validation", "tasks": t} for n, t in enumerate(tasks, 1)]


def chart(section: Section, name: str, place: int = 0) -> Lines:
    (figure,) = (each for each in section.figures if each.name == name)
    assert isinstance(figure, Figure) and isinstance(figure.charts[place], Lines)
    return figure.charts[place]  # type: ignore[return-value]


def test_seeds_are_one_line_with_a_band_and_configs_are_side_by_side(tmp_path: Path) -> None:
    runs = [
        run(tmp_path / "a1", "a", *lines_of(0.6, 0.7)),
        run(tmp_path / "a2", "a", *lines_of(0.7, 0.8)),
        run(tmp_path / "b", "b", *lines_of(0.8, 0.797)),
    ]
    section = analyse(runs, AnalyzeOptions())
    first, second = chart(section, "curves_validation_1").lines
    assert (first.name, second.name) == ("a (2 seeds)", "b")
    assert first.y == pytest.approx((0.65, 0.75)) and first.x == (10, 20)
    assert first.low == pytest.approx((0.65 - 0.0707, 0.75 - 0.0707), abs=1e-4)
    assert second.low is None and second.y == (0.8, 0.797)
    assert [line.name for line in chart(section, "curves_loss").lines] == ["a (2 seeds)", "b"]
    assert not section.skipped and not section.findings
    (last,) = (each for each in section.figures if isinstance(each, Table))
    row = next(row for row in last.rows if row[0] == "b" and row[4] == "AUC")
    assert row == ("b", 1, "validation", "click", "AUC", 0.8, 0.8, 10, 0.797, 20)


def test_a_fall_is_a_notice_and_odd_lines_are_said(tmp_path: Path) -> None:
    lines = lines_of(0.8, 0.7)
    fallen = run(tmp_path / "fallen", "fallen", *lines, lines[0], end='{"step": 3')
    empty = run(tmp_path / "empty", "empty")
    section = analyse([fallen, empty], AnalyzeOptions())
    (finding,) = section.findings
    assert finding.level == "notice"
    assert "was best after step 10, 0.8000, and fell to 0.7000 by step 20" in finding.text
    said = "\n".join(section.skipped)
    assert "metrics.jsonl of fallen: 1 line is cut short" in said
    assert "1 point is reported twice" in said and finding.figure == "curves_validation_1"
    assert "empty has no report of its training" in said


def test_windows_of_a_stream_and_branches_have_lines_of_their_own(tmp_path: Path) -> None:
    lines = [
        {"step": 5, "split": "window", "window": "w", "tasks": {"click": {"auc": 0.7}}},
        *({"step": 8, "split": "train", "loss": 0.4, "round": 1, "branch": name} for name in "xy"),
    ]
    section = analyse([run(tmp_path / "run", "run", *lines)], AnalyzeOptions())
    assert chart(section, "curves_window_1").lines[0].y == (0.7,)
    names = [line.name for line in chart(section, "curves_loss").lines]
    assert names == ["run, x, round 1", "run, y, round 1"]


def test_long_losses_are_smoothed_and_nothing_gives_no_figures(tmp_path: Path) -> None:
    reports = [{"step": n, "split": "train", "loss": float(n % 2)} for n in range(1, 401)]
    section = analyse([run(tmp_path / "long", "long", *reports)], AnalyzeOptions())
    line = chart(section, "curves_loss").lines[0]
    assert len(line.y) == 400 and 0.4 < min(line.y[20:-20]) <= max(line.y[20:-20]) < 0.6
    assert any("has no validation" in text for text in section.skipped)
    assert analyse([run(tmp_path / "none", "none")], AnalyzeOptions()).figures == ()
