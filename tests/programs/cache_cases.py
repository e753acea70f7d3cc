"""Run on one rank: the same steps without a pipeline of caches and with it; findings go to a file.

python -m tests.programs.cache_cases LOG OUT.json

On CUDA, tables lie in host memory behind a cache on the device. On a CPU there are no caches, and the same
steps are taken by the pipelines that it has.
"""

from __future__ import annotations

import json
import sys
from itertools import repeat
from pathlib import Path
from typing import Any

from pipelines.console import quiet_third_parties
from pipelines.start import open_split
from tests.helpers.launching import ROOT
from tests.programs.step_cases import SMALL
from trainer.assemble import build_sharded, feature_rows
from trainer.log.schema import read_manifest
from trainer.loop.pipeline import Pipeline
from trainer.quality.evaluate import score_split
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import load_config
from trainer.update.guard import Guard
from trainer.update.step import TrainStep, make_optimizer

CACHED = [
    "plan.allow_unified_memory=true",
    'plan.tables.attention__item_id.kernels=["fused_uvm_caching"]',
    'plan.tables.representation__item_id.kernels=["fused_uvm_caching"]',
]
EVERY = 3


def run(ranks: Ranks, log: Path, kind: str, *overrides: str) -> dict[str, Any]:
    """An epoch with an evaluation after every third step, and a stopped one with an evaluation after it."""
    changes = [*SMALL, "model.lookup=full", f"train.pipeline={kind}", *overrides]
    config = load_config(ROOT / "configs/dare.toml", [f"data.log={log}", *changes])
    sharded = build_sharded(config, read_manifest(log), ranks, training=True)
    optimizer = make_optimizer(sharded.model, config.train)
    step = TrainStep(config, sharded.model, optimizer, ranks.world_size, Guard(ranks, log))
    pipeline = Pipeline(kind, sharded.model, step, ranks.device)
    rows = feature_rows(sharded.groups)
    train = open_split(config, "train", rows, ranks, seed=3)
    validation = open_split(config, "validation", rows, ranks)
    losses, scores = [], []

    def measure() -> None:
        with pipeline.paused():
            scores.append(score_split(sharded.model, validation, ranks.device).score[:, 0].tolist())

    for _, tally in pipeline.train(train.steps(), repeat(EVERY)):
        losses.append(float(tally.total))
        if len(losses) % EVERY == 0:
            measure()
    stopped = pipeline.train(train.steps())
    losses += [float(next(stopped)[1].total) for _ in range(2)]
    stopped.close()
    measure()
    kernels = {placed.table: placed.kernel for placed in sharded.placements}
    return {"kind": pipeline.kind, "losses": losses, "scores": scores, "kernels": kernels}


def main(log: Path, out: Path) -> None:
    quiet_third_parties()
    with process_group(60) as ranks:
        cuda = ranks.device.type == "cuda"
        ways = {"plain": ("sparse_dist" if cuda else "none", []), "ahead": ("sparse_dist", [])}
        if cuda:
            ways |= {"cached": ("sparse_dist", CACHED), "ahead": ("prefetch", CACHED)}
        found = {name: run(ranks, log, kind, *changes) for name, (kind, changes) in ways.items()}
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
