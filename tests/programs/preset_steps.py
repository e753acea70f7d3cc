"""Run on every rank: some training steps of several presets in one process group; losses go to a file.

torchrun --nproc-per-node N -m tests.programs.preset_steps OUT.json PRESET@LOG...
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np

from pipelines.start import open_split
from tests.helpers.launching import ROOT
from tests.helpers.presets import renamed
from trainer.assemble import build_sharded, feature_rows
from trainer.log.schema import read_manifest
from trainer.loop.pipeline import Pipeline
from trainer.quality.evaluate import score_split
from trainer.ranks.process_group import process_group, sum_over_ranks
from trainer.run_config import Config, load_config
from trainer.update.guard import Guard
from trainer.update.step import TrainStep, run_optimizer

STEPS = 4
SMALL = ["data.history_length=12", "data.batch_candidates=48", "data.prefetch=0", "model.k=6", "train.seed=5"]
SMALL += ["train.learning_rate=0.001"]


def small_config(preset: str, log: Path, *words: str) -> Config:
    """A preset cut down to a log of a few users; wide first weights, so that mistakes show.

    A large eps keeps Adagrad from turning rounding, which differs from one number of ranks to another, into
    whole steps where a gradient is all but zero.
    """
    path = ROOT / f"configs/{preset}.toml"
    groups = load_config(path).groups
    dims = [f"groups.{name}.{key}" for name in groups for key in ("dim=8", "init_scale=0.7", "eps=0.01")]
    return load_config(path, [f"data.log={log}", *SMALL, *dims, *renamed(preset, log), *words])


def main() -> None:
    out, presets, found = Path(sys.argv[1]), [pair.split("@") for pair in sys.argv[2:]], {}
    with process_group(60) as ranks:
        for preset, log in presets:
            manifest, config = read_manifest(Path(log)), small_config(preset, Path(log))
            sharded = build_sharded(config, manifest, ranks)
            optimizer = run_optimizer(sharded.model, config)
            step = TrainStep(config, sharded.model, optimizer, ranks.world_size, Guard(ranks, out.parent))
            pipeline = Pipeline("none", sharded.model, step, ranks.device)
            rows = feature_rows(sharded.groups)
            reader = open_split(config, "train", rows, ranks, seed=3)
            losses = []
            for done, tally in pipeline.train(islice(reader.steps(), STEPS)):
                losses.append(float(sum_over_ranks(tally.total)) / done.batch.step_candidates)
            scored = score_split(sharded.model, open_split(config, "validation", rows, ranks), ranks.device)
            order = np.lexsort([scored.candidate, scored.request_id])
            found[preset] = {"losses": losses, "scores": scored.score[order].tolist()}
        if ranks.rank == 0:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
