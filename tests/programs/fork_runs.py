"""Script: runs of branches that are killed, and that go on elsewhere; one JSON report.

python -m tests.programs.fork_runs FOLDER [POINTS] [RANKS]

A whole run on so many ranks tells how often a step begins, rows are put back, validation is measured and a
file of a checkpoint is written. Then, POINTS times, a new run is killed before one of these at random, and
started again: both must end alike. At last a run on two ranks goes on alone from the middle of a branch.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipelines.train
from embeddings.lookup.before_change import RowsBeforeChange
from tests.helpers.forked import fork_ranks, one_thread
from tests.helpers.launching import SETTINGS, overrides
from tests.helpers.logs import IN_PART, enrich, observed_in_part, random_rows, write_log
from trainer.checkpoint import delta, files
from trainer.checkpoint import writer as hashed_writer
from trainer.checkpoint.tensors import TensorReader
from trainer.loop.loop import Trainer
from trainer.loop.validation import Validation
from trainer.ranks.process_group import Ranks
from trainer.run_config import Config, load_config

FLAT = {"decay": "none", "warmup_steps": 0}
BRANCHES = [
    {"name": "target", "weights": {"click": 0.0}},
    {"name": "both"},
    {"name": "cities", "domains": [1, 2]},
]
PHASES = [
    {"steps": 1, **FLAT},
    {"steps": 4, **FLAT, "fork": {"branches": BRANCHES, "every": 2, "task": "bought", "metric": "logloss"}},
    {"steps": 1, **FLAT},
]
EVENTS: list[tuple[Any, str]] = [
    (Trainer, "_set_rates"),
    (RowsBeforeChange, "put"),
    (Validation, "measure"),
    (delta.TensorStream, "__exit__"),
    (hashed_writer._HashingFileSystem, "create_stream"),
]


def config(log: Path, **changes: Any) -> Config:
    given = {**SETTINGS, "data.log": str(log), "checkpoint.every_steps": 2, "checkpoint.keep": 99}
    given |= {"data.domain": "city", "tasks.bought.label": "buy", "tasks.click.weight": 2.0}
    given |= {"groups.attention.sharding": ["row_wise"], "groups.representation.sharding": ["row_wise"]}
    given |= {"tables.item_id.rows": 4000, "checkpoint.full_every": 3, "train.timeout_s": 20}
    given |= {name.replace("__", "."): value for name, value in changes.items()}
    base = load_config(Path("configs/dare.toml"), overrides(given)[1::2])
    return Config.model_validate({**base.model_dump(), "phases": PHASES})


class Killer:
    """Counts events of this process, and kills it before one of them."""

    def __init__(self, said: Path, at: int) -> None:
        self.said, self.at, self.count = said, at, 0
        for kind, name in EVENTS:
            setattr(kind, name, self._counting(getattr(kind, name), f"{kind.__name__}.{name}"))

    def _counting(self, method: Callable[..., Any], what: str) -> Callable[..., Any]:
        def counting(*given: Any, **named: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                self.said.write_text(what)
                os.kill(os.getpid(), signal.SIGKILL)
            return method(*given, **named)

        return counting


class Runs:
    def __init__(self, root: Path) -> None:
        self.root, self.log = root, root / "log"
        rows = observed_in_part(enrich(random_rows(8), 8), 8)
        splits = {"train": rows, "validation": rows[:6], "test": rows[6:]}
        write_log(self.log, splits, rich=True, **IN_PART)

    def train(self, name: str, ranks: int, kill_at: int = -1, **changes: Any) -> tuple[list[int], int]:
        """-> exit codes, and the events of rank 0 where it ended by itself."""
        counted, settings = self.root / "counted", config(self.log, **changes)
        counted.write_text("0")

        def work(mine: Ranks) -> None:
            file = os.open(self.root / f"{name}.said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            killer = Killer(self.root / "before", kill_at if mine.rank == 0 else -1)
            pipelines.train.run(settings, self.root / name, mine)
            if mine.rank == 0:
                counted.write_text(str(killer.count))

        return fork_ranks(ranks, work, 20), int(counted.read_text())

    def ended(self, name: str) -> dict[str, Any]:
        """What a run comes to: digests of all tensors, losses, merges and their drawing."""
        newest = files.checkpoints(self.root / name / "checkpoints")[0]
        files.verify(newest)
        lines = [json.loads(line) for line in (self.root / name / "metrics.jsonl").read_text().splitlines()]
        told = [{k: v for k, v in line.items() if k != "samples_per_s"} for line in lines]
        drawn = (self.root / name / "lambda.svg").read_text()
        return {"step": newest.name[:13], "tensors": tensors(newest), "lines": told, "drawn": drawn}


def tensors(path: Path) -> dict[str, Any]:
    reader = TensorReader(path)
    return {name: reader.whole(name).tolist() for name in reader.saved_names()}


def far(one: Any, other: Any) -> float:
    """The largest difference between two trees of numbers."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return max((far(each, other[key]) for key, each in one.items()), default=0.0)
    if isinstance(one, list):
        assert len(one) == len(other)
        return max((far(*pair) for pair in zip(one, other, strict=True)), default=0.0)
    return abs(one - other)


def main(root: Path, points: int = 2, ranks: int = 1) -> None:
    runs, report = Runs(root), dict[str, Any]()
    codes, events = runs.train("whole", ranks)
    assert codes == [0] * ranks and events > 50, (runs.root / "whole.said").read_text()
    whole, draw = runs.ended("whole"), random.Random(points)
    report["merges"] = [line for line in whole["lines"] if line["split"] == "merge"]
    report["kills"] = []
    for point in range(points):
        # The points are spread over the run.
        at = draw.randrange(events * point // points, events * (point + 1) // points) + 1
        codes, _ = runs.train("killed", ranks, at)
        found = files.checkpoints(root / "killed" / "checkpoints")
        again, _ = runs.train("killed", ranks)
        kill = {"event": at, "of": events, "before": (root / "before").read_text(), "codes": codes}
        kill |= {
            "from": found[0].name if found else "",
            "again": again,
            "same": runs.ended("killed") == whole,
        }
        report["kills"].append(kill)
        shutil.rmtree(root / "killed")
    if ranks == 1:
        codes, _ = runs.train("moved", 2, train__max_steps=4)
        again, _ = runs.train("moved", 1)
        moved = runs.ended("moved")
        report["moved"] = {"codes": codes + again, "far": far(moved["tensors"], whole["tensors"])}
    (root / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    one_thread()
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
