"""The section on tables: dead rows, seen ids and hot rows of a checkpoint, against what was put into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.analyze import table_ids
from pipelines.analyze.options import AnalyzeOptions
from pipelines.analyze.report.model import Section, Table
from pipelines.analyze.runs import AnalysedRun, open_runs
from pipelines.analyze.tables import analyse
from tests.helpers.living import raw_id, raw_log, see, stage_of
from tests.helpers.logs import Shape, random_rows, small_log, write_log
from tests.helpers.models import preset
from tests.helpers.snapshots import save_run
from trainer.checkpoint import save_load as checkpoint
from trainer.checkpoint.accumulators import accumulator_of
from trainer.checkpoint.tensors import TensorReader
from trainer.log.schema import FeatureInfo
from trainer.ranks.process_group import process_group

OPTIONS = AnalyzeOptions(device="cpu")
DEAD = (0, 7, 8)


@contextmanager
def opened(*folders: Path) -> Iterator[tuple[AnalysedRun, ...]]:
    with process_group(device="cpu", alone=True) as ranks:
        yield open_runs(folders, ranks)


def table(section: Section, name: str) -> list[dict[str, object]]:
    (found,) = (each for each in section.figures if each.name == name)
    assert isinstance(found, Table)
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


def with_states(run: Path) -> None:
    """Save one checkpoint more, in which the optimizer has seen gradients of all rows but `DEAD`."""
    reader = TensorReader(run / "checkpoints" / "step-00000001")
    model, states = {name: reader.whole(name) for name in reader.names()}, {}
    for name, weight in model.items():
        if name.startswith("collections."):
            state = torch.ones(len(weight))
            state[list(DEAD)] = 0
            states[accumulator_of(name).removeprefix("optim.")] = state
    with process_group():
        checkpoint.save(run / "checkpoints", 2, {"model": model, "optim": states}, {"step": 2}, 9)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with optimizer states; the log has a vocabulary of categories and items that are never seen."""
    folder = tmp_path_factory.mktemp("tables")
    rows = random_rows(3, Shape(users=8, behaviors=12, requests=2))
    log = write_log(folder / "log", {"train": rows, "test": rows[:2]})
    run = save_run(folder / "run", log)
    with_states(run)
    return run


def test_dead_rows_and_ids_that_were_never_seen_are_counted(trained: Path) -> None:
    with opened(trained) as runs:
        section = analyse(runs, OPTIONS)
        weights = {each.name: runs[0].tensors.whole(each.tensor) for each in runs[0].tables()}
    rows = {row["table"]: row for row in table(section, "tables_rows")}
    assert [*rows] == [
        f"{g} / {f}" for g in ("attention", "representation") for f in ("item_id", "category_id")
    ]
    seen = set()
    for row in random_rows(3, Shape(users=8, behaviors=12, requests=2)):
        for end in row["request_history_end"]:
            seen |= set(row["history_item_id"][max(0, end - 12) : end])
        seen |= {item for items in row["candidate_item_id"] for item in items}
    items = rows["attention / item_id"]
    assert (items["rows"], items["never updated"], items["ids seen"]) == (60, 3, len(seen))
    assert items["share never seen"] == pytest.approx(1 - len(seen) / 60) and len(seen) < 60
    norms = weights["attention / item_id"].norm(dim=1).numpy()
    assert items["median norm"] == pytest.approx(np.median(norms))
    assert not section.skipped and not section.findings


def test_hot_rows_are_called_by_the_vocabulary(trained: Path, tmp_path: Path) -> None:
    log = trained.parent / "log"
    words = pa.table({"value": [f"c{number}" for number in range(1, 9)], "id": range(1, 9)})
    pq.write_table(words, log / "vocab" / "category_id.parquet", row_group_size=3)
    with opened(trained) as (run,):
        known = run.manifest.features | {"category_id": FeatureInfo(rows=9, vocabulary="0" * 64)}
        named = table_ids._values(
            run.manifest.model_copy(update={"features": known}), run, "category_id", np.array([8, 0, 3, 1])
        )
        assert named == {8: "c8", 3: "c3", 1: "c1"}
        hot = table(analyse([run], OPTIONS), "tables_hottest")
    of_table = [row for row in hot if row["table"] == "attention / category_id"]
    counts = [row["look-ups"] for row in of_table]
    assert counts == sorted(counts, reverse=True) and len(counts) == 5  # type: ignore[type-var]
    assert {"unknown"} < {row["id"] for row in hot} | {"unknown"}


def test_without_states_and_with_many_dead_rows(tmp_path: Path, trained: Path) -> None:
    plain = save_run(tmp_path / "plain", small_log(tmp_path / "log"))
    with opened(plain) as runs:
        section = analyse(runs, OPTIONS)
    assert any("their optimizer keeps no state" in text for text in section.skipped)
    assert table(section, "tables_rows")[0]["never updated"] is None
    with pytest.MonkeyPatch.context() as patch, opened(trained) as runs:
        patch.setattr("pipelines.analyze.tables._ROWS", 5)
        patch.setattr("pipelines.analyze.tables._MANY_DEAD", 0.04)
        (first, *_) = analyse(runs, OPTIONS).findings
    assert (
        first.level == "notice"
        and "3 of 60 rows of attention / item_id (run) were never updated" in first.text
    )


def test_a_part_of_a_large_split_says_so(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_ids, "_MOST", 1)
    monkeypatch.setattr(table_ids, "_LEAST", 30)
    with opened(trained) as runs:
        section = analyse(runs, OPTIONS)
    (said,) = section.skipped
    assert "look-ups were counted in a part of the training split" in said
    assert table(section, "tables_rows")[0]["share never seen"] is None


def test_ids_that_come_and_go_are_those_of_their_map(tmp_path: Path) -> None:
    log = raw_log(tmp_path / "log")
    ids = ("ids.item_id.capacity=64", "ids.item_id.shared_rows=4")
    stage = stage_of(preset("dare", log, *ids))
    for step in range(3):
        see(stage, range(step, 5), 86_400 * 10 * step)
    run = save_run(tmp_path / "run", log, "dare", *ids, ids=stage)
    with opened(run) as runs:
        section = analyse(runs, OPTIONS)
    items = next(row for row in table(section, "tables_rows") if row["table"] == "attention / item_id")
    assert (items["rows with an id"], items["ids seen"], items["share never seen"]) == (5, 5, 0)
    assert items["median days since seen"] == pytest.approx(0)
    names = [row["id"] for row in table(section, "tables_hottest") if row["table"] == "attention / item_id"]
    assert set(names) == {str(raw_id(number)) for number in range(5)}
