"""Collapse: numbers are numpy's, few ids and low ranks are told, and healthy tables are left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.analyze import collapse
from pipelines.analyze.options import AnalyzeOptions
from pipelines.analyze.report.model import Bars, Figure, Finding, Lines, Section, Table
from pipelines.analyze.runs import AnalysedRun, open_runs
from tests.helpers.logs import small_log
from tests.helpers.snapshots import save_run
from trainer.ranks.process_group import process_group

Change = Callable[[dict[str, Tensor]], None]
ITEMS = "representation__item_id"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("logs") / "log")


def analysed(*paths: Path) -> tuple[tuple[AnalysedRun, ...], Section]:
    with process_group(device="cpu", alone=True) as ranks:
        runs = open_runs(paths, ranks)
        return runs, collapse.analyse(runs, AnalyzeOptions())


def alarms(section: Section) -> list[Finding]:
    return [finding for finding in section.findings if finding.level == "alarm"]


def test_numbers_are_those_of_numpy_and_healthy_tables_raise_no_alarm(log: Path, tmp_path: Path) -> None:
    path = save_run(tmp_path / "run", log, "dare", "groups.attention.dim=4", "groups.representation.dim=4")
    (run,), section = analysed(path)
    bars, spectra, table = section.figures
    assert isinstance(table, Table) and isinstance(bars, Figure) and isinstance(spectra, Figure)
    assert not alarms(section)
    # Weights that were saved without an optimizer: all rows count.
    assert all("keeps no state" in text for text in section.skipped) and len(section.skipped) == 4
    for row, each in zip(table.rows, run.tables(), strict=True):
        values = np.linalg.svd(run.tensors.whole(each.tensor).double().numpy(), compute_uv=False)
        share = values / values.sum()
        assert row[:5] == ("run", each.name, each.spec.rows, each.spec.rows, 4)
        assert row[5] == pytest.approx(values.sum() / values[0])
        assert row[8] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
        chart = next(chart for chart in spectra.charts if chart.title == each.spec.feature)
        assert isinstance(chart, Lines)
        line = next(line for line in chart.lines if line.name == f"run: {each.group}")
        assert line.y == pytest.approx(values / values[0])
    abundance = bars.charts[0]
    assert isinstance(abundance, Bars)
    assert abundance.bars["run"] == pytest.approx([row[5] / 4 for row in table.rows])  # type: ignore[operator]


def of_rank_one(weights: dict[str, Tensor]) -> None:
    table = weights[ITEMS]
    direction = torch.linspace(-1, 1, table.shape[1])
    table.copy_(torch.arange(1.0, len(table) + 1)[:, None] * direction + 1e-4 * table)


def broken(weights: dict[str, Tensor]) -> None:
    weights[ITEMS][3, 1] = float("nan")


@pytest.mark.parametrize(
    ("change", "text"),
    [(of_rank_one, "representation / item_id of run has collapsed"), (broken, "1 rows of representation")],
)
def test_what_is_wrong_with_one_table_is_told(change: Change, text: str, log: Path, tmp_path: Path) -> None:
    narrow = ("groups.attention.dim=4", "groups.representation.dim=4")
    path = save_run(tmp_path / "run", log, "dare", *narrow, change=change)
    (alarm,) = alarms(analysed(path)[1])
    assert text in alarm.text


def test_fields_of_few_ids_are_named_once(log: Path, tmp_path: Path) -> None:
    """Of 9 rows; dimensions: 32 is more than twice as many, 12 is more, 4 is less."""
    wide = save_run(tmp_path / "wide", log, "dare", "groups.attention.dim=4", "groups.representation.dim=32")
    (alarm,) = analysed(wide)[1].findings
    assert alarm.level == "alarm"
    assert alarm.text.startswith("category_id has only 9 ids that were trained")
    assert "representation / category_id has 32 dimensions" in alarm.text
    more = save_run(tmp_path / "more", log, "dare", "groups.attention.dim=4", "groups.representation.dim=12")
    (notice,) = analysed(more)[1].findings
    assert notice.level == "notice" and "category_id has only 9" in notice.text


def test_seeds_of_a_config_are_one_line_with_a_band(log: Path, tmp_path: Path) -> None:
    seeds = [save_run(tmp_path / f"dare-{n}", log, "dare", f"train.seed={n}") for n in (1, 2)]
    twin = save_run(tmp_path / "twin", log, "twin")
    runs, section = analysed(*seeds, twin)
    assert [run.name for run in runs] == ["dare-1", "dare-2", "twin"]
    assert [run.label for run in runs] == ["dare", "dare", "twin"] and [run.seed for run in runs][:2] == [
        1,
        2,
    ]
    bars, spectra, table = section.figures
    assert isinstance(bars, Figure) and isinstance(spectra, Figure) and isinstance(table, Table)
    abundance, lines = bars.charts[0], spectra.charts[0]
    assert isinstance(abundance, Bars) and isinstance(lines, Lines) and abundance.low and abundance.high
    assert {*abundance.bars} == {"dare", "twin", "random table"}
    of_seeds = [row[5] / row[4] for row in table.rows if row[0] != "twin" and row[1] == abundance.groups[0]]  # type: ignore[operator]
    assert len(of_seeds) == 2 and of_seeds[0] != of_seeds[1]
    low, mean, high = (part["dare"][0] for part in (abundance.low, abundance.bars, abundance.high))
    assert (low, mean, high) == pytest.approx((min(of_seeds), np.mean(of_seeds), max(of_seeds)))
    by_name = {line.name: line for line in lines.lines}
    assert by_name["dare: representation"].low is not None and by_name["twin: shared"].low is None
