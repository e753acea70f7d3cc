"""Run on two ranks: the information abundance of tables in every sharding, and of the same tables unsharded.

torchrun --nproc-per-node 2 -m tests.programs.abundance OUT.json CHECKPOINTS

A checkpoint of each sharding stays in CHECKPOINTS/SHARDING, for a reader that has no ranks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor

from embeddings.first_rows import initial_rows_, table_seed
from embeddings.lookup.compile import make_collection
from embeddings.lookup.sharding import attach_optimizer, shard
from embeddings.plan.planner import make_plan
from embeddings.plan.request import PlanRequest
from tests.programs.tables_on_ranks import SEED, TYPES, case_of
from trainer.assemble import cluster_of
from trainer.checkpoint import save_load
from trainer.quality import information_abundance as module
from trainer.ranks.process_group import process_group


def main() -> None:
    found: dict[str, tuple[float, float]] = {}
    module._BAND = 4  # so that there are several
    with process_group(60) as ranks:
        for sharding in TYPES["bag"]:
            groups = {"all": case_of("bag", sharding, "sgd").groups["all"]}
            collection = make_collection(groups["all"], torch.device("meta"))
            attach_optimizer(collection, groups["all"].optimizer)
            model = torch.nn.ModuleDict({"collections": torch.nn.ModuleDict({"all": collection})})
            plan = make_plan(PlanRequest(model, tuple(groups.values()), cluster_of(ranks))).plan
            sharded = shard(model, groups, plan, ranks.device, SEED)
            state = sharded.state_dict()
            save_load.save(Path(sys.argv[2]) / sharding, 1, {"model": state}, {"step": 1}, 9)
            for name, weight in state.items():
                table = next(t for t in groups["all"].tables if groups["all"].table_name(t) in name)
                whole = torch.empty(table.rows, table.dim)
                initial_rows_(whole, table_seed(SEED, groups["all"].table_name(table)), groups["all"].first)
                ours = module.information_abundance(weight)
                values = torch.linalg.svdvals(whole.double())
                kind = "sharded" if isinstance(weight, ShardedTensor) else "replicated"
                found[f"{sharding} {kind} {name}"] = ours, float(values.sum() / values.max())
        if ranks.rank == 0:
            Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
