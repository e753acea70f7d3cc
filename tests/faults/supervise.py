"""torchrun's agent over ranks that start in a moment: `python -m tests.faults.supervise PLAN MAX_RESTARTS`.

What restarts the ranks is the very agent of torchrun; but they are forked from a server that has done the
slow imports, so that twenty kills take no minutes. tests/test_faults.py also kills under torchrun itself.
"""

from __future__ import annotations

import multiprocessing
import sys
import uuid

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.faults.drive import main


def supervise(plan_file: str, max_restarts: int) -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.faults.drive"])
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
    elastic_launch(config, main)(plan_file)


if __name__ == "__main__":
    supervise(sys.argv[1], int(sys.argv[2]))
