"""Many tables: the planner tries few ways of most, finds as good a plan, and says that it is at work."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from embeddings.errors import ConfigError
from embeddings.groups import TableGroup, TableSpec
from embeddings.lookup.compile import make_collection
from embeddings.lookup.sharding import attach_optimizer
from embeddings.optimizers import FusedOptimizer
from embeddings.plan import planner as plan_search
from embeddings.plan.planner import PlanEstimate, offline_plan
from embeddings.plan.request import Cluster, PlanRequest
from embeddings.plan.traffic import Lookup

GB = 10**9
ROWS = (10, 1000, 100_000, 5_000_000)
LINES: list[str] = []


def task(
    tables: int, hbm: int = 80 * GB, sharding: tuple[str, ...] = (), rows: tuple[int, ...] = ROWS
) -> PlanRequest:
    specs = tuple(TableSpec(f"f{i}", rows[i % len(rows)], 16) for i in range(tables))
    group = TableGroup("g", specs, sharding=sharding)
    model = nn.Module()
    model.g = make_collection(group, torch.device("meta"))
    attach_optimizer(model.g, FusedOptimizer())
    lookups = {group.table_name(spec): Lookup(1000, 1000) for spec in specs}
    return PlanRequest(
        model, (group,), Cluster("cuda", 8, 8, hbm, 500 * GB), lookups=lookups, say=LINES.append
    )


def work(found: PlanEstimate) -> float:
    """The estimated time of the rank that has most to do, by which plans are compared."""
    ranks = [0.0] * 8
    for option in found.options:
        for shard in option.shards:
            ranks[shard.rank] += shard.perf.total
    return max(ranks)


def test_many_tables_are_planned_as_well_from_fewer_arrangements(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    partition = plan_search.Partitioner.partition
    monkeypatch.setattr(
        plan_search.Partitioner,
        "partition",
        lambda self, *given, **named: (tried.append(1), partition(self, *given, **named))[1],
    )
    quick, few = offline_plan(task(48)), len(tried)
    monkeypatch.setattr(plan_search, "_DETAILED", 48)
    full = offline_plan(task(48))
    assert work(quick) == pytest.approx(work(full), rel=1e-6) and few < len(tried) - few


def test_what_fits_in_no_single_way_is_tried_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of 320 MB fit into ranks with half a gigabyte only where some are cut."""
    monkeypatch.setattr(plan_search, "_DETAILED", 2)
    ways = {
        option.sharding_type for option in offline_plan(task(12, int(0.62 * GB), rows=(5_000_000,))).options
    }
    assert ways - {"table_wise"}


def test_only_allowed_ways_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_search, "_DETAILED", 2)
    found = offline_plan(task(6, sharding=("row_wise",)))
    assert {option.sharding_type for option in found.options} == {"row_wise"}
    with pytest.raises(ConfigError, match="table g__f0 does not fit: its largest row_wise shard"):
        offline_plan(task(6, hbm=GB // 50, rows=(5_000_000,)))


def test_a_planner_that_takes_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    LINES.clear()
    offline_plan(task(6))
    assert not LINES
    monkeypatch.setattr(plan_search, "_PATIENCE_S", 0.0)
    offline_plan(task(6))
    assert LINES[0].startswith("planning where 6 tables lie on 8 rank(s): 0 arrangements tried in 0 s")
