"""Run on every rank: steps whose gradients are watched, with tables in several places; findings go to a file.

torchrun --nproc-per-node N -m tests.programs.watched_gradients LOG OUT.json CASE...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pipelines.console import quiet_third_parties
from tests.helpers.per_task import PER_TASK, training
from tests.programs.preset_steps import small_config
from trainer.ranks.process_group import process_group

STEPS = 4
WATCHED = "train.watch_gradients=2"
# A state for each row would be one for each column shard.
ADAGRAD = "groups.shared.optimizer=adagrad"
# Name -> preset, pipeline, settings; `twin` is the plain form of the two behind it.
CASES = {
    "twin": ("twin_paper_dare", "none", [ADAGRAD]),
    "row-wise": ("twin_paper_dare", "none", [ADAGRAD, 'groups.shared.sharding=["row_wise"]']),
    "column-wise": (
        "twin_paper_dare", "sparse_dist",
        [ADAGRAD, 'groups.shared.sharding=["column_wise"]', "model.lookup=full"],
    ),
    "by task": ("mmoe", "none", [PER_TASK]),
}  # fmt: skip


def main() -> None:
    log, out, found = Path(sys.argv[1]), Path(sys.argv[2]), dict[str, Any]()
    names = sys.argv[3:]
    quiet_third_parties()
    with process_group(60) as ranks:
        for name in names:
            preset, way, words = CASES[name]
            made = training(small_config(preset, log, WATCHED, *words), ranks, out.parent, way)
            assert len(list(made.steps(STEPS))) == STEPS
            found[name] = made.step.report()["gradients"]
        if ranks.rank == 0:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
