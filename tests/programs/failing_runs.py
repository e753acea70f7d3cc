"""Script: ranks of which one fails, dies or is slow where the others wait for it; one JSON report.

python -m tests.programs.failing_runs FOLDER
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import trainer.checkpoint.files
import trainer.checkpoint.save_load
import trainer.checkpoint.warm_start
import trainer.loop.attempts
import trainer.run_folder
from embeddings.agreement import from_every_rank, from_rank_0
from embeddings.errors import ConfigError
from embeddings.plan import planner as planning
from tests.helpers.forked import fork_ranks, one_thread
from tests.helpers.logs import Shape, random_rows, write_log
from tests.programs.saving_runs import Runs
from trainer.checkpoint import files as checkpoint_files
from trainer.ranks.process_group import Ranks
from trainer.run_folder import MetricsLog, RunFolder

FULL = OSError(errno.ENOSPC, "No space left on device", "/full")
OTHER = KeyError("surprise")
# Of the ranks' collectives, where that matters: enough for ranks of a busy machine to meet.
WAIT_S = 6.0
# What fails on rank 0, and how: an error of the system or of a program, none of the trainer's own.
PLACES: dict[str, tuple[Any, str, BaseException]] = {
    "look for checkpoints": (checkpoint_files, "checkpoints", FULL),
    "note the start": (trainer.loop.attempts, "_note", OTHER),
    "write the config": (RunFolder, "write_config", FULL),
    "plan": (planning, "offline_plan", MemoryError()),
    "lock": (RunFolder, "lock", FULL),
    "open the metrics": (trainer.run_folder, "SummaryWriter", FULL),
    "name a checkpoint": (trainer.checkpoint.files, "new_part", FULL),
    "sum up": (RunFolder, "update_summary", FULL),
}


def failing(place: tuple[Any, str, BaseException], on: int = 0) -> Callable[[Ranks], None]:
    owner, name, error = place

    def fail(*_: Any, **__: Any) -> None:
        raise error

    def before(ranks: Ranks) -> None:
        if ranks.rank == on:
            setattr(owner, name, SimpleNamespace(urandom=fail) if name == "os" else fail)

    return before


def full_metrics(ranks: Ranks) -> None:
    """The disk is full when rank 0 writes its first line."""
    if ranks.rank == 0:
        opened = MetricsLog.__init__

        def full(self: MetricsLog, folder: RunFolder, resumed_at: int) -> None:
            opened(self, folder, resumed_at)
            self._file = Path("/dev/full").open("a", encoding="utf-8")  # noqa: SIM115

        MetricsLog.__init__ = full  # type: ignore[method-assign]


def ask(root: Path, name: str, work: Callable[[], Any], timeout_s: float) -> dict[str, Any]:
    """Run `work` on three ranks; -> exit codes, and what each got or raised."""

    def rank(ranks: Ranks) -> None:
        found = root / f"{name}.{ranks.rank}"
        try:
            found.write_text(repr(work()))
        except BaseException as error:
            found.write_text(f"{type(error).__name__}: {error}")
            raise

    codes = fork_ranks(3, rank, timeout_s)
    files = [root / f"{name}.{number}" for number in range(3)]
    return {"codes": codes, "got": [file.read_text() if file.exists() else "" for file in files]}


def slow_unshard(ranks: Ranks) -> None:
    """It takes longer than the ranks' collectives wait."""
    unshard = trainer.checkpoint.warm_start.unshard_run

    def slowly(run: Path, out: Path) -> Any:
        time.sleep(WAIT_S + 2)
        return unshard(run, out)

    trainer.checkpoint.warm_start.unshard_run = slowly


def die(rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)


def breaking(rank: int) -> int:
    if torch.distributed.get_rank() == rank:
        raise OTHER
    return rank


def local_value() -> Any:
    """On rank 1 a value that pickle refuses."""
    return (lambda: 0) if torch.distributed.get_rank() == 1 else 0


def local_error() -> Any:
    """Raises one of the project's own errors, which holds what pickle refuses."""
    error = ConfigError("surprise")
    error.held = lambda: 0  # type: ignore[attr-defined]
    raise error


def with_a_bad_row_group(path: Path) -> Path:
    """A log of which the second row group, that rank 1 tries, holds an id outside its table."""
    rows = random_rows(2, Shape(users=24))
    rows[4]["history_item_id"] = [61] * rows[4]["num_behaviors"]
    return write_log(path, {"train": rows})


def main(root: Path) -> None:
    runs, report = Runs(root), {}
    for name, place in PLACES.items():
        report[name] = runs.train(name, 2, failing(place), train__max_steps=2)
    report["write metrics"] = runs.train("write metrics", 2, full_metrics)
    report["dead"] = ask(root, "dead", lambda: from_every_rank(lambda: die(2), slow=True), WAIT_S)
    report["broken"] = ask(root, "broken", lambda: from_rank_0(lambda: breaking(0), slow=True), 60)
    report["one broken"] = ask(root, "one", lambda: from_every_rank(lambda: breaking(1)), 60)
    report["no answer"] = ask(root, "no answer", lambda: from_rank_0(lambda: lambda: 0), 60)
    report["one no answer"] = ask(root, "no one", lambda: from_every_rank(local_value), 60)
    report["local error"] = ask(root, "local", lambda: from_rank_0(local_error), 60)
    # A run that starts from another: rank 0 unshards, every rank fills its shards.
    whole = {"train__max_steps": 2, "train__init_from": str(root / "sum up")}
    report["unshard"] = runs.train(
        "warm", 2, failing((trainer.checkpoint.warm_start, "unshard_run", OTHER)), **whole
    )
    report["slow"] = runs.train("slow", 2, slow_unshard, train__timeout_s=WAIT_S, **whole)
    runs.log = with_a_bad_row_group(root / "bad")
    skip = {"data__on_bad": "skip", "data__max_bad": 0.5, "checkpoint__every_steps": 2}
    report["skipped"] = runs.train("skip", 2, train__max_steps=4, **skip)
    report["skipped again"] = runs.train("skip", 2, train__max_steps=6, **skip)
    report["skipped on one"] = runs.train("skip", 1, train__max_steps=8, **skip)
    (root / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    one_thread()
    main(Path(sys.argv[1]))
