"""Two tables of 2,000,000,000 rows on 16 GPUs: the plan's memory is what a hand calculation gives.

The sizes are those of docs/plan.md: two groups of 16 and 128 columns of fp32, row-wise Adagrad, two nodes of
eight ranks. Every figure below is written out, so that it can be checked with pencil and paper.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from embeddings.groups import TableGroup, TableSpec
from embeddings.lookup.compile import make_collection
from embeddings.lookup.sharding import attach_optimizer
from embeddings.optimizers import FusedOptimizer
from embeddings.plan.memory import RankMemory, memory_of_ranks
from embeddings.plan.planner import offline_plan
from embeddings.plan.request import Cluster, PlanRequest, PlanRules, TableRule
from embeddings.plan.traffic import Lookup

GB = 10**9
ROWS = 2_000_000_000
# Bags of a step over all 16 ranks: 402,048 for attention, 40,064 for representation; 25,128 and 2,504 a rank.
BAGS = {"attention": 402_048, "representation": 40_064}


def planned(kind: str, kernel: str = "fused", hbm: int = 141, ddr: int = 125) -> list[RankMemory]:
    """What each of 16 ranks holds where both tables lie in one way."""
    model, groups = nn.Module(), []
    for name, dim in (("attention", 16), ("representation", 128)):
        group = TableGroup(name, (TableSpec("item", ROWS, dim),))
        collection = make_collection(group, torch.device("meta"))
        attach_optimizer(collection, FusedOptimizer())
        setattr(model, name, collection)
        groups.append(group)
    tables = {f"{name}__item": TableRule((kind,), (kernel,)) for name in BAGS}
    found = offline_plan(
        PlanRequest(
            model,
            tuple(groups),
            Cluster("cuda", 16, 8, hbm * GB, ddr * GB),
            PlanRules(allow_unified_memory=kernel != "fused", tables=tables),
            {f"{name}__item": Lookup(count, count) for name, count in BAGS.items()},
        )
    )
    return memory_of_ranks(found.options, found.tables, 16, "cuda")


def test_row_wise() -> None:
    """Each rank has 2,000,000,000 / 16 = 125,000,000 rows of both tables."""
    held = planned("row_wise")
    # 125,000,000 x (16 + 128) columns x 4 B.
    weights = 72_000_000_000
    # 125,000,000 rows x 2 tables x 4 B.
    state = 1_000_000_000
    assert [(m.weights, m.optimizer) for m in held] == [(weights, state)] * 16
    # One in 16 ids of all ranks lies here, as many as a rank has bags: (25,128 + 2,504) x 8 B. Vectors leave
    # as blocks of all bags of all ranks, 402,048 x 16 x 4 B and
    # 40,064 x 128 x 4 B; TorchRec leaves out the 16th of it that comes home.
    ids = (25_128 + 2_504) * 8
    vectors = (402_048 * 16 + 40_064 * 128) * 4
    assert {m.buffers for m in held} == {ids + vectors} == {46_464_896}
    assert sum(m.weights for m in held) == 1_152 * GB and sum(m.optimizer for m in held) == 16 * GB


def test_table_row_wise() -> None:
    """Each table on the eight ranks of one node, 2,000,000,000 / 8 = 250,000,000 rows a rank."""
    held = planned("table_row_wise", hbm=192)
    nodes = {held[0].weights: held[:8], held[8].weights: held[8:]}
    # 250,000,000 rows x 16 columns x 4 B and x 128 columns x 4 B; a state of 4 B a row on both nodes.
    assert sorted(nodes) == [16_000_000_000, 128_000_000_000]
    for ranks in nodes.values():
        assert len({(m.weights, m.optimizer) for m in ranks}) == 1
    assert {m.optimizer for m in held} == {1_000_000_000}
    assert max(m.total for m in held) / (sum(m.total for m in held) / 16) == pytest.approx(1.77, abs=0.01)


def test_column_wise() -> None:
    """4 parts of 4 columns and 16 of 8; each part has a state of its own for all rows."""
    held = planned("column_wise", hbm=192)
    # 2,000,000,000 rows x (16 + 128) columns x 4 B are 1,152 GB, whoever has them.
    assert sum(m.weights for m in held) == 1_152 * GB
    # 16 / 4 = 4 parts and 128 / 8 = 16 parts, 2,000,000,000 x 4 B for each.
    assert sum(m.optimizer for m in held) == (4 + 16) * 8 * GB
    # A part of 8 columns: 64 GB and its state; of 4 columns: 32 GB and its state.
    assert {(m.weights, m.optimizer) for m in held} == {(64 * GB, 8 * GB), (96 * GB, 16 * GB)}


def test_table_wise() -> None:
    """Each table whole on a rank: 2,000,000,000 x 16 x 4 B = 128 GB, and x 128 x 4 B = 1,024 GB."""
    held = planned("table_wise", hbm=1_300)
    full = sorted((m.weights, m.optimizer) for m in held if m.weights)
    assert full == [(128 * GB, 8 * GB), (1_024 * GB, 8 * GB)]


def test_grid_shard() -> None:
    """Half of the columns on each node, an eighth of the rows on each of its ranks."""
    held = planned("grid_shard")
    # 250,000,000 rows x (8 + 64) columns x 4 B; a state of 4 B for each row of each part.
    assert {(m.weights, m.optimizer) for m in held} == {(72_000_000_000, 2_000_000_000)}


@pytest.mark.parametrize("kernel", ["fused_uvm", "fused_uvm_caching"])
def test_uvm(kernel: str) -> None:
    """Row-wise in host memory: 72 GB of weights and 1 GB of state a rank, as `test_row_wise`."""
    held = planned("row_wise", kernel)
    assert {(m.host_weights, m.host_optimizer) for m in held} == {(72_000_000_000, 1_000_000_000)}
    assert {m.host for m in held} == {73_000_000_000} and all(m.weights == m.optimizer == 0 for m in held)
    step = (25_128 + 2_504) * 8 + (402_048 * 16 + 40_064 * 128) * 4
    if kernel == "fused_uvm":
        assert {m.buffers for m in held} == {step}
    else:
        # A fifth of the rows on the device, 14.4 GB of weights and 0.2 GB of state; FBGEMM's map of rows, 4 B
        # for each of 250,000,000, and 16 B for each of a fifth of them: 1 GB and 0.8 GB.
        cache = 14_400_000_000 + 200_000_000 + 1_000_000_000 + 800_000_000
        assert {m.buffers for m in held} == {step + cache}
