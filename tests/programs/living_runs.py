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

from embeddings.ids.bucket_map import BucketMap
from embeddings.ids.parts import part_for
from tests.helpers.forked import one_thread
from tests.helpers.logs import Shape, random_rows, write_log
from tests.programs.delta_runs import also_in_full, compared
from tests.programs.saving_runs import Runs, at_step, digests, terminate
from trainer.checkpoint import files, id_files
from trainer.checkpoint.tensors import TensorReader
from trainer.log.schema import FeatureInfo

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


def maps(run: Path) -> dict[str, dict[str, Any]]:
    """Of each checkpoint: the clock, and every array of the whole map as a list."""
    found = {}
    for path in sorted(files.checkpoints(run / "checkpoints")):
        headers = id_files._open(path)
        rules = id_files.IdRules(**headers[0].maps["item_id"][1]["rules"])
        every = [file.part("item_id") for file in headers]
        state = part_for(range(rules.buckets), every, rules, rules)
        BucketMap(rules, range(rules.buckets)).load(state)
        found[path.name] = {
            "clock": headers[0].clock,
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
    (root / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    one_thread()
    main(Path(sys.argv[1]))
