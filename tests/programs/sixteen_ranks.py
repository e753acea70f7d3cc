"""Script: the same tiny run on one rank and on sixteen, forked from one process; one JSON report.

python -m tests.programs.sixteen_ranks FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pipelines.train
from tests.helpers.forked import fork_ranks, one_thread
from tests.helpers.launching import SETTINGS, losses, overrides
from tests.helpers.logs import small_log
from trainer.ranks.process_group import Ranks
from trainer.run_config import load_config

# Patience for sixteen processes on two cores.
WAIT_S = 120


def run(root: Path) -> None:
    # Blocks of one request, so that most ranks have some of each step; and tables in rows on all ranks.
    settings = {
        **SETTINGS,
        "data.log": str(small_log(root / "log", seed=1, users=48)),
        "data.requests_per_block": 1,
        "data.batch_candidates": 160,
        "checkpoint.every_steps": 0,
        "checkpoint.mode": "sync",
        "train.max_steps": 4,
        "train.epochs": 2,
        "train.timeout_s": WAIT_S,
        "groups.attention.sharding": ["row_wise"],
    }
    report = {}
    for ranks in (1, 16):
        config, out = load_config(Path("configs/dare.toml"), overrides(settings)[1::2]), root / f"on-{ranks}"

        def work(place: Ranks) -> None:
            file = os.open(root / f"said-{place.world_size}-{place.rank}", os.O_WRONLY | os.O_CREAT)
            os.dup2(file, 1)
            os.dup2(file, 2)
            pipelines.train.run(config, out, place)  # noqa: B023 - forked before the next round

        codes = fork_ranks(ranks, work, WAIT_S, WAIT_S)
        report[str(ranks)] = {"codes": codes, "losses": losses(out) if not any(codes) else []}
    (root / "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    one_thread()
    run(Path(sys.argv[1]))
