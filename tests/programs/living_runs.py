"""Script: trainings whose item ids are raw and come and go, on forked ranks; one JSON report.

python -m tests.programs.living_runs FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from embeddings.ids.parts import part_for
from tests.helpers.forked import one_thread
from tests.helpers.logs import Shape, random_rows, write_log
from tests.programs.delta_runs import also_in_full, compared
from tests.programs.saving_runs import Runs, at_step, digests, terminate
from trainer.checkpoint import files
from trainer.checkpoint.id_files import SavedMaps
from trainer.checkpoint.tensors import TensorReader
from trainer.log.schema import FeatureInfo
from trainer.run_config import Config

ITEMS = 500
# Two buckets of 65 rows, so that some of four ranks have none.
IDS = {
    "ids__item_id__capacity": 130,
    "ids__item_id__shared_rows": 4,
    "ids__item_id__ttl_days": 240 / 86_400,
    "checkpoint__every_steps": 4,
    "checkpoint__keep": 99,
    "train__max_steps": 8,
    "train__epochs": 4,
    "data__batch_candidates": 40,
    "data__order": "stored",
}


PHASES = [
    {"name": "a", "passes": 3, "early_stopping": {"patience": 2}},
    {"name": "b", "steps": 2, "freeze": ["tables"]},
    {"name": "c", "steps": 2, "reset": ["groups.attention"]},
]


def raw_log(path: Path, users: int = 24) -> Path:
    """Item ids are any 64-bit integers."""
    rows, rng = random_rows(1, Shape(users=users)), np.random.default_rng(2)
    raw = rng.integers(np.iinfo(np.int64).min, np.iinfo(np.int64).max, ITEMS)

    def drawn(count: int) -> list[int]:
        found: list[int] = raw[(ITEMS * rng.uniform(0, 1, count) ** 2).astype(int)].tolist()
        return found

    for number, row in enumerate(rows):
        # Later users come later, so that ids expire.
        for key in ("history_timestamp", "request_timestamp"):
            row[key] = [time + 15 * number for time in row[key]]
        row["history_item_id"] = drawn(row["num_behaviors"])
        row["candidate_item_id"] = [drawn(count) for count in row["request_num_candidates"]]
    splits = {"train": rows, "validation": rows[:6], "test": rows[6:9]}
    return write_log(path, splits, more={"item_id": FeatureInfo(rows=1, raw=True)})


class LivingRuns(Runs):
    def __init__(self, root: Path) -> None:
        self.root = root
        self.log = raw_log(root / "log")

    def live(self, name: str, ranks: int, *before: Any, **changes: Any) -> dict[str, Any]:
        changed = {**IDS, **changes}
        done = self.train(name, ranks, *before, **changed)
        assert done["codes"] == [0] * ranks, done["said"]
        return done

    def config(self, **changes: Any) -> Config:
        phases = changes.pop("phases", None)
        found = super().config(**changes)
        return found if phases is None else Config.model_validate({**found.model_dump(), "phases": phases})


def maps(run: Path, name: str = "item_id") -> dict[str, dict[str, Any]]:
    """Of each checkpoint: the clock, and every array of a whole map as a list."""
    found = {}
    for path in sorted(files.checkpoints(run / "checkpoints")):
        saved = SavedMaps.open(path)
        rules = saved.rules()[name]
        state = part_for(range(rules.buckets), saved.parts(name), rules, rules)
        found[path.name] = {
            "clock": saved.clock,
            **{key: array.tolist() for key, array in state.items()},
        }
    return found


def tables_differ(one: Path, other: Path) -> float:
    """The largest difference of a weight or state in two checkpoints."""
    first, second = TensorReader(one), TensorReader(other)
    names = sorted(first._tensors)
    assert sorted(second._tensors) == names
    return max(float((first.whole(name) - second.whole(name)).abs().max()) for name in names)


def counts(run: Path) -> list[dict[str, int]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["ids.item_id"] for line in lines if line["split"] == "train"]


def phased(runs: LivingRuns, root: Path) -> dict[str, Any]:
    """A run that goes back to its best weights, freezes all tables, and draws some anew; on 2 ranks and 1."""
    own = {"ids__item_id__groups__attention": 70, "train__validate_every": 2, "checkpoint__every_steps": 0}
    own |= {"train__max_steps": 0, "train__epochs": 1, "phases": PHASES}
    found = {}
    for ranks, pipeline in ((2, "sparse_dist"), (1, "none")):
        run = f"phased-{ranks}"
        done = runs.live(run, ranks, **own, train__pipeline=pipeline)
        of_last = [[*maps(root / run, name).values()][-1] for name in ("item_id", "item_id@attention")]
        lines = [line for line in done["said"].splitlines() if "ends with its best weights" in line]
        found[str(ranks)] = {"maps": of_last, "lines": lines, "counts": counts(root / run)}
    return found


def main(root: Path) -> None:
    runs, report = LivingRuns(root), dict[str, Any]()
    runs.live("one", 1, checkpoint__mode="sync")
    runs.live("two", 2)
    ahead = {"train__pipeline": "sparse_dist"}
    measured = {**ahead, "train__validate_every": 3, "checkpoint__check_every": 1}
    runs.live("stopped", 2, at_step(1, 5, terminate), **measured)
    report["stopped after"] = files.step_of(files.checkpoints(root / "stopped" / "checkpoints")[0])
    runs.live("stopped", 2, **measured)
    for ranks in (1, 3, 4):
        shutil.copytree(root / "two", root / f"two-{ranks}")
        shutil.rmtree(root / f"two-{ranks}" / "checkpoints" / "step-00000008")
        runs.live(f"two-{ranks}", ranks)
    names = ("one", "two", "stopped", "two-1", "two-3", "two-4")
    last = {name: files.checkpoints(root / name / "checkpoints")[0] for name in names}
    report["maps"] = {name: maps(root / name) for name in names}
    report["apart"] = {name: tables_differ(last["one"], path) for name, path in last.items()}
    report["digests"] = {name: digests(root / name) for name in ("two", "stopped")}
    report["counts"] = {name: counts(root / name) for name in names}
    many = {"ids__item_id__capacity": 2000, "checkpoint__full_every": 99, "checkpoint__every_steps": 1}
    runs.live("deltas", 2, also_in_full(root / "deltas full"), **{**ahead, **many, "train__max_steps": 4})
    report["deltas"] = compared(root / "deltas", root / "deltas full")
    report["phased"] = phased(runs, root)
    (root / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    one_thread()
    main(Path(sys.argv[1]))
