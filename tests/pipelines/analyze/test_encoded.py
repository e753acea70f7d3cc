"""Analysis of runs whose log has numbers, and whose candidates have similarities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.analyze import search
from pipelines.analyze.analyze import analyze
from pipelines.analyze.options import AnalyzeOptions
from pipelines.analyze.report.model import Table
from pipelines.analyze.runs import open_runs
from tests.helpers.logs import FeatureInfo, Row, Shape, random_rows, write_log
from tests.helpers.similarity import drawn_vectors, write_parquet
from tests.helpers.snapshots import save_run
from trainer.log.encoders.buckets import Buckets
from trainer.log.encoders.code import ABOVE, MISSING
from trainer.log.encoders.mnse import Mnse
from trainer.ranks.process_group import process_group

NUMBERS = {
    "price": FeatureInfo(rows=1, encoder=Mnse(kind="mnse", range=(-20, 9_999))),
    "band": FeatureInfo(rows=1, encoder=Buckets(kind="buckets", edges=(0, 10, 1_000))),
}


def rows_with_numbers() -> list[Row]:
    """Few of all numbers of the range, some missing, some beyond it, some negative."""
    rows, rng = random_rows(5, Shape(users=14, candidates=15)), np.random.default_rng(5)

    def drawn(count: int) -> list[int]:
        return np.asarray(rng.choice([MISSING, ABOVE, -7, 1, 13, 4_000], count)).tolist()

    for row in rows:
        for name in NUMBERS:
            row[f"history_{name}"] = drawn(row["num_behaviors"])
            row[f"candidate_{name}"] = [drawn(count) for count in row["request_num_candidates"]]
    return rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rows = tmp_path_factory.mktemp("encoded"), rows_with_numbers()
    log = write_log(folder / "log", {"train": rows, "test": rows}, more=NUMBERS)
    vectors = write_parquet(folder / "items.parquet", drawn_vectors(3, range(1, 40)))
    more = [f"data.vectors.items.file={vectors}", "data.vectors.items.key=item_id"]
    more += ["data.similarity.near.of=items", "data.similarity.near.to=items"]
    return save_run(folder / "run", log, "dare", *more)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports are made and not drawn, which takes most of the time; test_runs.py draws every section."""
    monkeypatch.setattr("pipelines.analyze.analyze.write_report", lambda report, out: out)


def test_the_model_of_some_requests_scores_as_that_of_all(run: Path) -> None:
    """A part of a number has as many rows as its encoder says, however few of them a request has."""
    with process_group(device="cpu", alone=True) as ranks:
        (opened,) = open_runs([run], ranks)
        batches = [step.batch for step in opened.reader("test", candidates=40).steps()]
        assert len(batches) > 2
        whole = opened.model(batches)
        for batch in batches:
            np.testing.assert_array_equal(opened.model([batch]).score(batch), whole.score(batch))


@pytest.mark.usefixtures("undrawn")
def test_every_section_is_made(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "ENOUGH", 8)
    what = ("entanglement", "gradients", "search", "tables")
    report = analyze([run], tmp_path / "report", AnalyzeOptions(what=what, device="cpu"))
    for section in report.sections:
        assert section.figures, section
    (tables,) = (section for section in report.sections if section.name == "tables")
    rows = next(each for each in tables.figures if isinstance(each, Table))
    assert any("price_base_10" in str(cell) for row in rows.rows for cell in row)
    left_out = " ".join(tables.skipped)
    for part in ("price_base_10", "band", "near_base_2"):
        assert f"ids of {part} are not counted" in left_out


@pytest.mark.usefixtures("undrawn")
def test_a_section_that_cannot_be_made_costs_no_other(run: Path, tmp_path: Path) -> None:
    options = AnalyzeOptions(what=("collapse", "search"), split="validation", device="cpu")
    collapse, of_search = analyze([run], tmp_path / "report", options).sections
    assert collapse.figures and not of_search.figures
    assert "the log has requests in" in " ".join(of_search.skipped)
