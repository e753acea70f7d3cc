"""Run on every rank: one step by the loss of one task alone, and which sharded tables it moved.

torchrun --nproc-per-node N -m tests.programs.stem_isolation LOG OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor

from embeddings.lookup.shards import local_shards
from pipelines.start import open_split
from tests.programs.preset_steps import small_config
from trainer.assemble import ShardedModel, build_sharded, feature_rows
from trainer.log.schema import read_manifest
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import Config

# Layers of experts, and what a task sees of the others.
CASES = {"stopped 1": (1, "stopped"), "stopped 2": (2, "stopped"), "open 1": (1, "open")}


def tables_of(sharded: ShardedModel) -> dict[str, list[torch.Tensor]]:
    """Name -> copies of what lies on this rank."""
    return {
        name: [shard.tensor.clone() for shard in local_shards(weight)]
        for name, weight in sharded.model.state_dict().items()
        if isinstance(weight, ShardedTensor)
    }


def moved(config: Config, log: Path, task: int, ranks: Ranks) -> dict[str, bool]:
    """Set of the representation -> whether a row of it that lies on this rank changed."""
    sharded = build_sharded(config, read_manifest(log), ranks)
    reader = open_split(config, "train", feature_rows(sharded.groups), ranks, seed=3)
    before = tables_of(sharded)
    # Rows are updated within the backward pass.
    sharded.model(next(iter(reader.steps())).batch).logits[:, task].square().sum().backward()
    after = tables_of(sharded)
    found: dict[str, bool] = {}
    for name, shards in after.items():
        if "representation/" in name and shards:
            set_ = name.split("representation/")[1].split("/")[0]
            found[set_] = found.get(set_, False) or any(map(_differ, shards, before[name]))
    return found


def _differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return not torch.equal(a, b)


def main() -> None:
    log, out, found = Path(sys.argv[1]), Path(sys.argv[2]), {}
    with process_group(60) as ranks:
        for name, (layers, foreign) in CASES.items():
            config = small_config("stem", log)
            experts = config.model.experts.model_copy(update={"layers": layers, "foreign": foreign})
            config = config.model_copy(update={"model": config.model.model_copy(update={"experts": experts})})
            for task in (0, 1):
                of_ranks: list[dict[str, bool]] = [{}] * ranks.world_size
                dist.all_gather_object(of_ranks, moved(config, log, task, ranks))
                found[f"{name} {task}"] = of_ranks
        if ranks.rank == 0:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
