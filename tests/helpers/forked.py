"""Ranks as forks of one process that has imported torch: many process groups for the price of one import.

Only for scripts started by a test: the parent must not have used a thread when it forks.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import torch

from trainer.ranks.process_group import Ranks, process_group


def fork(work: Callable[[], None]) -> int:
    """Start `work` in a child that ends with 0, or with 1 and a traceback; -> its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def one_thread() -> None:
    """Have torch and Arrow work without threads of their own, which a fork would lose."""
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)


def wait_all(pids: list[int], seconds: int = 60) -> list[int]:
    """-> exit code of each, negative for a signal; all are killed where it takes too long."""

    def late(*_: object) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        raise TimeoutError(f"{pids} took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fork_ranks(
    world_size: int, work: Callable[[Ranks], None], timeout_s: float = 30, seconds: int = 60, **group: Any
) -> list[int]:
    """Run `work` on so many ranks of one process group; -> their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def member(rank: int) -> None:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ.update({name: str(value) for name, value in places.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
        with process_group(timeout_s, **group) as ranks:
            work(ranks)

    return wait_all([fork(lambda rank=rank: member(rank)) for rank in range(world_size)], seconds)
