"""Tables so small that row shards leave ranks without rows. All runs share one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType as OptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn

from embeddings.groups import TableGroup, TableSpec
from embeddings.lookup.compile import make_collection
from embeddings.lookup.sharded import admit_empty_shards, leaves_ranks_empty
from embeddings.plan.constraints import constraints_of
from embeddings.plan.request import Cluster, PlanRequest
from tests.helpers.launching import reported
from tests.programs.tiny_tables import ROWS, WAYS
from trainer.quality.scored import read_scores

Report = dict[str, Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def report(root: Path) -> Report:
    return reported("tests.programs.tiny_tables", root)


@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_tables_with_empty_shards_equal_plain_ones(report: Report, kind: str, way: str) -> None:
    compared = report["compared"]
    assert compared["codes"] == [0, 0, 0]
    for rows in ROWS:
        for rank in compared["found"]:
            assert rank[f"{kind} {way} {json.dumps(rows)}"] < 2e-6, rows
            assert kind != "bag" or rank[f"sets {way} {json.dumps(rows)}"] < 2e-6, rows


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


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heights", [(5, 0), (0, 5), (0, 5, 0), (0,), (0, 0)])
def test_kernels_bear_tables_without_rows(heights: tuple[int, ...], device: str) -> None:
    """As ranks have them, whose ids ask for no such table: vectors of all, and an update of the others."""
    where = (EmbeddingLocation.HOST, ComputeDevice.CPU)
    if device == "cuda":
        where = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA)
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, 8, *where) for rows in heights], optimizer=OptimType.EXACT_SGD, learning_rate=1.0
    )
    admit_empty_shards([nn.ModuleList([kernel])])
    for weights in kernel.split_embedding_weights():
        weights.fill_(1.0)
    bags = 3
    lengths = torch.tensor([1 if rows else 0 for rows in heights for _ in range(bags)])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.tensor([4, 0, 4] * sum(rows > 0 for rows in heights), dtype=torch.int64)
    found = kernel(ids.to(device), offsets.to(device))
    expected = torch.tensor([[1.0] * 8 if rows else [0.0] * 8 for rows in heights]).reshape(1, -1)
    assert torch.equal(found.cpu(), expected.expand(bags, -1))
    found.sum().backward()
    for rows, weights in zip(heights, kernel.split_embedding_weights(), strict=True):
        left = torch.ones(rows, 8)
        left[[0, 4] if rows else []] -= torch.tensor([[1.0], [2.0]] if rows else []).reshape(-1, 1)
        assert torch.equal(weights.cpu(), left)


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
        task = PlanRequest(make_collection(group, torch.device("meta")), (group,), cluster)
        allowed = constraints_of(task)["g__f"].sharding_types
        assert allowed is not None
        assert ("row_wise" in allowed) is (sharding == told or not empty)
        assert ("table_wise" in allowed) is (sharding == ())
