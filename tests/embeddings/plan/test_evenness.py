"""Of plans that are about as fast, the one whose fullest rank holds least; never slower than that allows."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.perf_models import NoopPerfModel
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.types import Perf, Shard, ShardingOption, Storage

from embeddings.groups import TableGroup, TableSpec
from embeddings.lookup.compile import make_collection
from embeddings.lookup.sharding import attach_optimizer, sharders
from embeddings.optimizers import FusedOptimizer
from embeddings.plan import planner as plan_search
from embeddings.plan.constraints import constraints_of
from embeddings.plan.evenness import WORTH
from embeddings.plan.exchange_places import exchange_places, shares
from embeddings.plan.file import to_tree
from embeddings.plan.memory import Reservation, memory_of_ranks
from embeddings.plan.planner import ChosenOptions, Enumerator, offline_plan, saved_plan
from embeddings.plan.request import Cluster, PlanRequest, PlanRules, TableRule
from embeddings.plan.tables import dense_bytes, tables_of
from embeddings.plan.traffic import Lookup

GB = 10**9
HBM = 80 * GB


def task(
    rows: list[int], widths: tuple[int, int], nodes: tuple[int, int], bags: int = 100_000, hbm: int = HBM
) -> PlanRequest:
    """Tables of these rows in two groups; the second is asked for a tenth of the bags."""
    model, groups, lookups = nn.Module(), [], {}
    for name, dim, asked in zip(("early", "late"), widths, (bags, bags // 10), strict=True):
        group = TableGroup(name, tuple(TableSpec(f"f{i}", count, dim) for i, count in enumerate(rows)))
        collection = make_collection(group, torch.device("meta"))
        attach_optimizer(collection, FusedOptimizer())
        setattr(model, name, collection)
        groups.append(group)
        lookups |= {group.table_name(table): Lookup(asked, asked) for table in group.tables}
    return PlanRequest(model, tuple(groups), Cluster("cuda", *nodes, hbm, 500 * GB), lookups=lookups)


def torchrec_alone(request: PlanRequest) -> float:
    """The estimated time of the plan that TorchRec's planner takes by itself, as it was asked before."""
    tables, constraints = tables_of(request.model), constraints_of(request)
    topology = plan_search._topology(request.cluster)
    chosen = ChosenOptions()
    EmbeddingShardingPlanner(
        topology=topology,
        constraints=constraints,
        enumerator=Enumerator(topology, constraints, tables),
        storage_reservation=Reservation(request.rules.reserve, dense_bytes(request.model, tables)),
        proposer=[
            GridSearchProposer(max_proposals=300), GreedyProposer(), GreedyProposer(use_depth=False),
            UniformProposer(),
        ],
        stats=chosen,
        debug=False,
    ).plan(request.model, sharders(request.comms))  # fmt: skip
    return float(NoopPerfModel(topology).rate(chosen.options))


@settings(max_examples=12, deadline=None)
@given(
    rows=st.lists(st.floats(3, 9).map(lambda power: int(10**power)), min_size=1, max_size=5),
    widths=st.tuples(st.sampled_from((4, 16, 32)), st.sampled_from((16, 64))),
    nodes=st.sampled_from(((8, 8), (16, 8), (16, 4), (24, 8))),
    bags=st.integers(10_000, 1_000_000),
    within=st.sampled_from((0.0, 0.1, 0.5)),
)
def test_no_plan_is_slower_than_allowed_or_fuller_than_the_fastest(
    rows: list[int], widths: tuple[int, int], nodes: tuple[int, int], bags: int, within: float
) -> None:
    asked = replace(task(rows, widths, nodes, bags), rules=PlanRules(even_within=within))
    found = offline_plan(asked)
    alone = torchrec_alone(asked)
    assert found.fastest.time == pytest.approx(alone, rel=1e-12)
    assert found.taken.time <= alone * (1 + within) * (1 + 1e-12)
    assert found.taken.fullest <= found.fastest.fullest + WORTH
    held = memory_of_ranks(found.options, found.tables, nodes[0], "cuda")
    assert max(memory.total for memory in held) == pytest.approx(found.taken.fullest * found.usable)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), nodes=st.sampled_from(((8, 4), (12, 4), (6, 2))))
def test_trading_places_never_makes_a_rank_fuller_or_slower_than_the_limit(
    data: st.DataObject, nodes: tuple[int, int]
) -> None:
    world, local = nodes
    costs = st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 20))
    plan = []
    for _ in range(data.draw(st.integers(1, 8))):
        kind = data.draw(st.sampled_from(("table_wise", "table_row_wise", "row_wise")))
        width = {"table_wise": 1, "table_row_wise": local, "row_wise": world}[kind]
        place = data.draw(st.integers(0, world // width - 1))
        plan.append(stand_in(kind, [data.draw(costs) for _ in range(width)], place * width))
    room = (100, 200)
    before = shares(plan, world, room)
    slow = max(times(plan, world))
    limit = slow * data.draw(st.sampled_from((1.0, 1.3)))
    unmoved = [[shard.rank for shard in o.shards] for o in plan if o.sharding_type == "row_wise"]
    made = exchange_places(plan, nodes, room, limit)
    after = shares(plan, world, room)
    assert after.max() <= before.max() and max(times(plan, world)) <= limit + 1e-9
    assert made == 0 or sorted(after)[::-1] < sorted(before)[::-1]
    assert [[shard.rank for shard in o.shards] for o in plan if o.sharding_type == "row_wise"] == unmoved
    for option in plan:
        if option.sharding_type == "table_row_wise":
            first = option.shards[0].rank
            assert first % local == 0
            assert [shard.rank for shard in option.shards] == list(range(first, first + local))


def stand_in(kind: str, costs: list[tuple[int, int, int]], first: int) -> ShardingOption:
    """An option with as many shards, each with its memory and time, from a rank on."""
    shards = [
        Shard([1, 1], [0, 0], Storage(hbm=hbm, ddr=ddr), Perf(float(ms), 0, 0, 0), first + number)
        for number, (hbm, ddr, ms) in enumerate(costs)
    ]
    module = nn.Module()
    return ShardingOption(
        "t", torch.empty(1, 1, device="meta"), ("m", module), [], 1, kind, "uniform", "fused", shards
    )


def times(plan: list[ShardingOption], world: int) -> list[float]:
    found = [0.0] * world
    for option in plan:
        for shard in option.shards:
            found[shard.rank] += shard.perf.total
    return found


def test_tables_that_cost_the_same_time_trade_places() -> None:
    """Two nodes; the greedy planner puts the large tables of both groups on one of them."""
    asked = task(
        [1_200_000_000, 900_000_000, 700_000_000, 300_000_000, 200_000_000], (4, 32), (16, 8), 70_000
    )
    found = offline_plan(asked)
    assert found.taken is not found.fastest and found.taken.time <= 1.1 * found.fastest.time
    held = [m.total for m in memory_of_ranks(found.options, found.tables, 16, "cuda")]
    assert found.fastest.fullest - found.taken.fullest > 0.02
    assert max(held) * 16 / sum(held) < 1.08


def test_small_tables_lie_as_torchrec_places_them() -> None:
    """A change must be worth something: the placement of a small run is the same as before."""
    found = offline_plan(task([5_000_000, 20_000, 300], (16, 32), (8, 4)))
    assert found.taken is found.fastest and found.taken.fullest < WORTH


def test_the_plan_does_not_depend_on_the_order_of_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchRec lists the ways of a table in the order of a set of strings, which each process hashes anew."""
    asked = task([100_000_000, 3_000_000, 500], (16, 64), (16, 8))
    trees = [to_tree(saved_plan(asked, offline_plan(asked).plan)) for _ in range(2)]
    enumerate_ways = EmbeddingEnumerator.enumerate
    rng = np.random.default_rng(0)

    def shuffled(self: EmbeddingEnumerator, *arguments: object, **named: object) -> list[ShardingOption]:
        ways = copy.copy(enumerate_ways(self, *arguments, **named))
        rng.shuffle(ways)  # type: ignore[arg-type]
        return ways

    monkeypatch.setattr(EmbeddingEnumerator, "enumerate", shuffled)
    trees += [to_tree(saved_plan(asked, offline_plan(asked).plan)) for _ in range(3)]
    assert all(tree == trees[0] for tree in trees[1:])


def test_a_grid_has_one_part_of_the_columns_on_each_node() -> None:
    """Each part keeps a row-wise state of its own: as many parts as ranks were eight times more."""
    asked = task([1_000_000_000, 300], (16, 64), (16, 8))
    rules = {f"{group}__f0": TableRule(("grid_shard",)) for group in ("early", "late")}
    found = offline_plan(replace(asked, rules=PlanRules(tables=rules)))
    late = next(option for option in found.options if option.name == "late__f0")
    assert {tuple(shard.size) for shard in late.shards} == {(125_000_000, 32)} and len(late.shards) == 16
    held = memory_of_ranks(found.options, found.tables, 16, "cuda")
    # Weights of 80 columns, and two states of 4 bytes a row for each table.
    assert sum(m.optimizer for m in held) == pytest.approx(2 * 2 * 4 * 10**9, rel=1e-5)
    assert max(m.total for m in held) * 16 < 1.001 * sum(m.total for m in held)
