"""One rank of a training that is meant to fail: `python -m tests.programs.drive PLAN` under torchrun.

It builds the training as `tandemrec train` does, with a hook after each step that fails where PLAN says.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.quick_imports import quick_imports
from launch.reporting import report

with quick_imports():
    import torch

    from pipelines.console import quiet_third_parties
    from pipelines.train import run
    from trainer.ranks.process_group import process_group
    from trainer.run_config import load_config

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Fault:
    """What happens to `rank` once it has done `step`.

    Attributes:
        how: `kill` and `stop` are signals, `raise` an exception; `kill_launcher` kills torchrun instead.
        after_ms: later than the end of the step; 0 = at once, in the hook.
    """

    rank: int
    step: int
    how: str = "kill"
    after_ms: int = 0


@dataclass(frozen=True)
class Plan:
    """A training and its faults: the n-th start of the ranks meets the n-th fault.

    Attributes:
        run: the run folder; config, overrides: as for `tandemrec train`.
        again: later starts meet the last fault.
    """

    run: str
    config: str
    overrides: list[str]
    faults: list[Fault]
    again: bool = False

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path


def read_plan(path: str) -> Plan:
    tree = json.loads(Path(path).read_text(encoding="utf-8"))
    return Plan(**{**tree, "faults": [Fault(**fault) for fault in tree["faults"]]})


def fail_at(fault: Fault | None, rank: int, marks: Path) -> Callable[[int], None]:
    """The hook: notes each step with its time in `marks`, and fails in its turn."""

    def after_step(step: int) -> None:
        with marks.open("a", encoding="utf-8") as file:
            file.write(f"{time.time()} {step}\n")
        if fault is None or (fault.rank, fault.step) != (rank, step):
            return
        with marks.open("a", encoding="utf-8") as file:
            file.write(f"{time.time()} {fault.how}\n")
        if fault.how == "raise":
            raise ValueError(f"injected into rank {rank} after step {step}")
        target = os.getppid() if fault.how == "kill_launcher" else os.getpid()
        deed = signal.SIGSTOP if fault.how == "stop" else signal.SIGKILL
        if fault.after_ms:
            threading.Timer(fault.after_ms / 1000, os.kill, (target, deed)).start()
        else:
            os.kill(target, deed)

    return after_step


def drive(plan_file: str) -> None:
    plan, attempt = read_plan(plan_file), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    torch.set_num_threads(1)
    quiet_third_parties()
    config = load_config(ROOT / plan.config, plan.overrides)
    faults = (
        plan.faults[-1:] if plan.again and attempt >= len(plan.faults) else plan.faults[attempt : attempt + 1]
    )
    with process_group(config.train.timeout_s) as ranks:
        marks = Path(f"{plan.run}.marks-{ranks.rank}")
        with marks.open("a", encoding="utf-8") as file:
            file.write(f"{time.time()} pid {os.getpid()}\n")
        run(config, Path(plan.run), ranks, fail_at(faults[0] if faults else None, ranks.rank, marks))


def redirect(said: Sequence[str]) -> None:
    """Stdout and stderr of this process to these files."""
    for stream, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)


def main(plan_file: str, *said: str) -> None:
    """`drive`, with errors and exit code as those of the command line.

    Args:
        said: files for stdout and stderr; empty = those of the process.
    """
    redirect(said)
    try:
        drive(plan_file)
    except Exception as error:
        sys.exit(report(error, debug=False))


if __name__ == "__main__":
    main(sys.argv[1])
