"""One of two ranks: ids that travel once are looked up and trained as ids that travel for each table.

Three sets of two widths lie as a random number says, each table by itself in one of two ways. Writes one JSON
file a rank: seed -> how many numbers differ, and the bytes of ids that it sent, once and for each table.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import tests.programs.tables_on_ranks as tables
from benchmarks.harness.collectives import CollectiveCounter
from embeddings.lookup.compile import make_collection
from embeddings.lookup.jagged import one_id_bags
from embeddings.lookup.sharded import Exchange
from embeddings.lookup.sharding import attach_optimizer, shard
from embeddings.lookup.shards import local_shards
from embeddings.plan.planner import make_plan, placements
from embeddings.plan.request import PlanRequest, PlanRules, TableRule
from embeddings.plan.traffic import Lookup, sending_ids, traffic
from trainer.assemble import cluster_of
from trainer.ranks.process_group import Ranks, process_group

SEEDS = range(6)


def case_of(seed: int) -> tuple[tables.Case, PlanRules]:
    """Two groups, and for each of their tables the way that it lies."""
    rng = random.Random(seed)
    case, ways = tables.case_of("bag", "table_wise", "adagrad", sets=tables.SETS), tables.TYPES["bag"]
    two = rng.sample(ways, 2)
    rules = {
        group.table_name(table): TableRule(sharding=(rng.choice(two),))
        for group in case.groups.values()
        for table in group.tables
    }
    return case, PlanRules(tables=rules)


def trained(case: tables.Case, rules: PlanRules, ranks: Ranks) -> tuple[list[Tensor], int]:
    """All vectors that this rank was given, then the rows that it has; and the bytes of ids that it sent."""
    collections = {}
    for name, group in case.groups.items():
        collections[name] = make_collection(group, torch.device("meta"))
        attach_optimizer(collections[name], group.optimizer)
    model, groups = tables.TwoLookups(collections, case.groups), tuple(case.groups.values())
    plan = make_plan(PlanRequest(model, groups, cluster_of(ranks), rules)).plan
    sharded = shard(model, case.groups, plan, ranks.device, 5, case.comms, case.exchange)
    found: list[Tensor] = []
    with CollectiveCounter() as exchanged:
        for step in range(tables.STEPS):
            part = tables.part_of("bag", step, ranks.rank, case.group.width)
            vectors = sharded(part)
            found += [each.detach().clone() for each in vectors]
            part.loss(vectors).backward()
            sharded.fused_optimizer.step()
    rows = [part.tensor for weight in sharded.state_dict().values() for part in local_shards(weight)]
    return [*found, *rows], exchanged.bytes_of(floats=False)


def forecast(sharding: str, ranks: Ranks) -> dict[str, float]:
    """Bytes of ids of one look-up, over both ranks: as `plan` says, and as they are sent."""
    group = tables.case_of("bag", sharding, "sgd", sets=tables.SETS).group
    model = nn.Module()
    model.all = make_collection(group, torch.device("meta"))
    attach_optimizer(model.all, group.optimizer)
    saved = make_plan(PlanRequest(model, (group,), cluster_of(ranks)))
    placed = [(line.table, line.sharding, line.ranks) for line in placements(saved, [group])]
    sends = sending_ids(placed, [group], "cpu")
    # As many ids in one half of the rows as in the other, for row-wise ranks.
    last = [rows - 1 for rows in tables.ROWS.values()]
    bags = one_id_bags(list(tables.ROWS), torch.tensor([[0] * 6 + [end] * 6 for end in last]))
    said = sum(
        traffic((1, 8), kind, len(on), Lookup(24, 24), 2, 2, True, sends_ids=sends[name]).ids
        for name, kind, on in placed
    )
    sharded = shard(model, {"all": group}, saved.plan, ranks.device, 5)
    with CollectiveCounter() as exchanged:
        sharded.module.all(bags)
    sent = torch.tensor(exchanged.bytes_of(floats=False))
    dist.all_reduce(sent)
    return {"said": said, "sent": int(sent)}


def main(out: Path) -> None:
    with process_group(timeout_s=60) as ranks:
        report: dict[Any, Any] = {}
        for seed in SEEDS:
            case, rules = case_of(seed)
            (once, fewer), (each, more) = (
                trained(replace(case, exchange=Exchange(once=way)), rules, ranks) for way in (True, False)
            )
            different = sum(int((a != b).sum()) for a, b in zip(once, each, strict=True))
            numbers = sum(tensor.numel() for tensor in once)
            report[seed] = {"different": different, "numbers": numbers, "once": fewer, "each": more}
        for sharding in ("table_wise", "row_wise", "column_wise"):
            report[sharding] = forecast(sharding, ranks)
        (out / f"rank{ranks.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
