"""Tables so small that row shards leave ranks without rows. All runs share one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from embeddings.collections import make_collection
from embeddings.empty_shards import leaves_ranks_empty
from embeddings.groups import TableGroup, TableSpec
from embeddings.plan_constraints import constraints_of
from embeddings.plan_task import Cluster, Task
from tests.launching import reported
from tests.tiny_tables import ROWS, WAYS
from trainer.scored import read_scores

Report = dict[str, Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def report(root: Path) -> Report:
    return reported("tests.tiny_tables", root)


@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_tables_with_empty_shards_equal_plain_ones(report: Report, kind: str, way: str) -> None:
    compared = report["compared"]
    assert compared["codes"] == [0, 0, 0]
    for rows in ROWS:
        for rank in compared["found"]:
            assert rank[f"{kind} {way} {json.dumps(rows)}"] < 2e-6, rows


def near(mine: list[float], theirs: list[float]) -> bool:
    return max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) < 1e-5


def test_they_train_resume_and_reshard(report: Report) -> None:
    whole = report["whole"]["losses"]
    assert len(whole) == 4 and near(report["row_wise"]["losses"], whole)
    for way in ("row_wise", "grid_shard"):
        again = report[f"{way} again"]
        assert report[way]["codes"] == again["codes"] == [0] * 4
        assert again["left"] == ["step-00000003", "step-00000004"]
        assert again["losses"] == report[way]["losses"] and report[f"{way} differ"] == []
    assert report["on 1"]["codes"] == [0] and near(report["on 1"]["losses"], whole)
    assert report["on 4"]["codes"] == [0] * 4 and near(report["on 4"]["losses"], whole)


def test_they_are_exported_scored_unsharded_and_started_from(root: Path, report: Report) -> None:
    """Export compares the snapshot's scores with the trainer's, bit by bit."""
    for name in ("row_wise export", "grid_shard export", "row_wise unshard", "grid_shard unshard", "score"):
        assert report[name] == 0, name
    assert len(read_scores(root / "scores.parquet").user_id) > 50
    for source in ("row_wise", "grid_shard-plain"):
        assert report[f"from {source}"]["codes"] == [0] * 4
    assert report["from row_wise"]["losses"][0] < report["whole"]["losses"][0] - 0.05


@pytest.mark.parametrize(
    ("rows", "ranks", "empty"),
    [(31, 9, True), (33, 9, False), (1, 1, False), (1, 2, True), (4, 3, True), (5, 3, False), (16, 4, False)],
)
def test_small_tables_are_cut_into_rows_only_where_that_is_asked_for(
    rows: int, ranks: int, empty: bool
) -> None:
    assert leaves_ranks_empty(rows, ranks) is empty
    told, cluster = ("row_wise",), Cluster("cuda", ranks, ranks, 1 << 36, 1 << 36)
    for sharding in ((), told):
        group = TableGroup("g", (TableSpec("f", rows, 8),), sharding=sharding)
        task = Task(make_collection(group, torch.device("meta")), (group,), cluster)
        allowed = constraints_of(task)["g__f"].sharding_types
        assert allowed is not None
        assert ("row_wise" in allowed) is (sharding == told or not empty)
        assert ("table_wise" in allowed) is (sharding == ())
