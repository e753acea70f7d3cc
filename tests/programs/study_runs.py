"""Script: studies with a killed worker, with several workers at once, and on two ranks.

    python -m tests.programs.study_runs FOLDER

Writes report.json into the folder: the trials of each study.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from pipelines.tune.plan import StudyPlan
from pipelines.tune.study import SharedStudy, Validation
from pipelines.tune.worker import work
from tests.helpers.forked import fork, one_thread, wait_all
from tests.helpers.logs import small_log
from tests.helpers.studies import plan_of, rows_of

Report = Callable[[SharedStudy, Validation], bool]
_REPORT: Report = SharedStudy.report


def worker(plan: StudyPlan, folder: Path, report: Report = _REPORT) -> Callable[[], None]:
    def start() -> None:
        SharedStudy.report = report  # type: ignore[method-assign]
        work(plan, folder, "")

    folder.mkdir(exist_ok=True)
    return start


def dying(shared: SharedStudy, seen: Validation) -> bool:
    """The worker gets SIGKILL in the last trial but one, after its last validation and before its end."""
    pruned = _REPORT(shared, seen)
    if (shared.number, seen.step) == (2, 4):
        os.kill(os.getpid(), signal.SIGKILL)
    return pruned


def pruning(shared: SharedStudy, seen: Validation) -> bool:
    """Trial 1 ends after its first validation."""
    _REPORT(shared, seen)
    return (shared.number, seen.step) == (1, 2)


def on_two_ranks(start: Callable[[], None]) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }

    def member(rank: int) -> None:
        os.environ.update({**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        start()

    return wait_all([fork(lambda rank=rank: member(rank)) for rank in range(2)])


def main(root: Path) -> None:
    one_thread()
    plan = plan_of(root / "spaces", small_log(root / "log", seed=1))
    whole, killed, many, ranks = (root / name for name in ("whole", "killed", "many", "ranks"))
    codes = {
        "whole": wait_all([fork(worker(plan, whole))]),
        "killed": wait_all([fork(worker(plan, killed, dying))]),
    }
    first = rows_of(killed)
    codes["resumed"] = wait_all([fork(worker(plan, killed))])
    codes["many"] = wait_all([fork(worker(plan, many)) for _ in range(3)])
    codes["ranks"] = on_two_ranks(worker(plan, ranks, pruning))
    found = {folder.name: rows_of(folder) for folder in (whole, killed, many, ranks)}
    logs = {
        name: (folder / "trials" / trial / "train.log").read_text()
        for name, folder, trial in (("killed", killed, "0002"), ("pruned", ranks, "0001"))
    }
    report = {"codes": codes, "rows": found, "before": first, "logs": logs}
    (root / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
