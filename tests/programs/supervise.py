"""torchrun's agent over ranks that start at once: `python -m tests.programs.supervise PLAN RESTARTS GRACE`,
or of the command line, `python -m tests.programs.supervise command RESTARTS GRACE WORDS`.

What restarts the ranks is the very agent of torchrun; but they are forked from the server of
`tests.helpers.launching`, which has done the slow imports, so that twenty kills take no minutes.
test_faults.py also kills under torchrun itself.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Sequence

from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.multiprocessing.spawn import ProcessContext

import launch.cli
from tests.programs.drive import main, redirect


def shorten_grace(seconds: float) -> None:
    """Between SIGTERM and SIGKILL of ranks beside a failed one; torch 2.13 waits 30 s, without an option."""
    waiting = ProcessContext._join_procs_with_timeout

    def shorter(self: ProcessContext, timeout: float) -> None:
        waiting(self, min(timeout, seconds))

    ProcessContext._join_procs_with_timeout = shorter  # type: ignore[method-assign]


def command(words: Sequence[str], *said: str) -> None:
    """One rank of `tandemrec WORDS`; `said` are files for its stdout and stderr."""
    redirect(said)
    sys.exit(launch.cli.main(words))


def supervise(rank: Callable[..., None], what: str | Sequence[str], max_restarts: int) -> None:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        monitor_interval=0.05,
        start_method="forkserver",
    )
    # The server's children have its stdout and stderr.
    said = [os.readlink(f"/proc/self/fd/{stream}") for stream in (1, 2)]
    elastic_launch(config, rank)(what, *said)


if __name__ == "__main__":
    shorten_grace(float(sys.argv[3]))
    if sys.argv[1] == "command":
        supervise(command, sys.argv[4:], int(sys.argv[2]))
    else:
        supervise(main, sys.argv[1], int(sys.argv[2]))
