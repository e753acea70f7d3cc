"""Run on every rank: some steps of AdaTask, with tables in several places; losses and weights go to a file.

torchrun --nproc-per-node N -m tests.programs.lane_cases LOG OUT.pt
"""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines.console import quiet_third_parties
from tests.helpers.per_task import PER_TASK, PRODUCT, pieces, training, whole
from tests.programs.preset_steps import small_config
from trainer.ranks.process_group import process_group, sum_over_ranks

STEPS = 5
CASES = {
    "mmoe": ("mmoe", "none", []),
    "row-wise": ("mmoe", "none", ['groups.attention.sharding=["row_wise"]']),
    # Row-wise Adagrad would have a state for each column shard.
    "column-wise": (
        "mmoe", "none",
        ['groups.representation.sharding=["column_wise"]', "groups.representation.optimizer=adagrad"],
    ),
    "ahead": ("mmoe", "sparse_dist", []),
    "sets of tasks": ("stem", "none", PRODUCT),
}  # fmt: skip


def main() -> None:
    log, out, found = Path(sys.argv[1]), Path(sys.argv[2]), dict[str, Any]()
    quiet_third_parties()
    with process_group(60) as ranks:
        for name, (preset, way, words) in CASES.items():
            made = training(small_config(preset, log, PER_TASK, *words), ranks, out.parent, way)
            losses = []
            for done, tally in made.pipeline.train(islice(made.reader.steps(), STEPS)):
                losses.append(float(sum_over_ranks(tally.total)) / done.batch.step_candidates)
            everyone: list[Any] = [None] * ranks.world_size
            dist.all_gather_object(everyone, pieces(made.sharded.model.state_dict()))
            found[name] = losses, made.step.report()["dominance"]["mean"], whole(everyone)
        if ranks.rank == 0:
            torch.save(found, out)


if __name__ == "__main__":
    main()
