"""Script: ranks whose main thread waits where nothing can be raised, under the heartbeat; one JSON report.

python -m tests.programs.heartbeat_runs FOLDER [nccl]
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from embeddings.agreement import from_rank_0
from tests.helpers.forked import fork, fork_ranks, one_thread, wait_all
from trainer.ranks import process_group as distributed
from trainer.ranks.device import DeviceName
from trainer.ranks.process_group import Ranks, naming_the_lost

# A main thread that is stuck is not interrupted by anything for so long, which is longer than any test waits.
STUCK_S = 50


def wait_for_the_other() -> None:
    """Begin a collective and wait for it as one waits for a device: no error ends that."""
    dist.all_reduce(torch.ones(2), async_op=True)
    time.sleep(STUCK_S)


def dead(ranks: Ranks) -> None:
    dist.all_reduce(torch.ones(2))
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for_the_other()


def hung(ranks: Ranks) -> None:
    """Rank 1 lives, but its main thread does not come to the next collective."""
    dist.all_reduce(torch.ones(2))
    if ranks.rank == 1:
        time.sleep(STUCK_S)
    with naming_the_lost(ranks, lambda: "after step 7"):
        wait_for_the_other()


def woken(ranks: Ranks) -> None:
    """Aborting wakes the main thread, which then stumbles over what it got."""
    aborted = threading.Event()
    distributed.abort_collectives = lambda backend: aborted.set()
    if ranks.rank == 1:
        time.sleep(STUCK_S)
    with naming_the_lost(ranks, lambda: "after step 7"):
        dist.all_reduce(torch.ones(2), async_op=True)
        assert aborted.wait(STUCK_S)
        raise ValueError("the loss is not finite")


def unnoticed(ranks: Ranks) -> None:
    """The main thread is woken and goes on with what it got, as if nothing had happened."""
    aborted = threading.Event()
    distributed.abort_collectives = lambda backend: aborted.set()
    if ranks.rank == 1:
        time.sleep(STUCK_S)
    dist.all_reduce(torch.ones(2), async_op=True)
    assert aborted.wait(STUCK_S)
    ranks.check_launcher()
    raise AssertionError("went on")


def unhurried(ranks: Ranks) -> None:
    """Rank 0 works for longer than the time-out while the other waits for what it says."""
    assert from_rank_0(lambda: time.sleep(4) or 5, slow=True) == 5
    dist.all_reduce(torch.ones(2))


def apart(ranks: Ranks) -> None:
    """A rank that has come to its end is not missed by one that still works."""
    dist.all_reduce(torch.ones(2))
    time.sleep(4 if ranks.rank == 0 else 0)


def wait_for_the_device(ranks: Ranks) -> None:
    """A collective over NCCL that the other rank never joins."""
    with naming_the_lost(ranks, lambda: "after step 7"):
        dist.all_reduce(torch.ones(2, device=ranks.device))
        torch.cuda.synchronize()
        dist.all_reduce(torch.ones(2, device=ranks.device))


def dead_nccl(ranks: Ranks) -> None:
    dist.all_reduce(torch.ones(2, device=ranks.device))
    torch.cuda.synchronize()
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for_the_device(ranks)


def hung_nccl(ranks: Ranks) -> None:
    if ranks.rank == 1:
        time.sleep(STUCK_S)
    wait_for_the_device(ranks)


def unhurried_nccl(ranks: Ranks) -> None:
    total = torch.ones(2, device=ranks.device)
    dist.all_reduce(total)
    unhurried(ranks)
    dist.all_reduce(total)
    assert total.tolist() == [4, 4]


NCCL: dict[str, tuple[Callable[[Ranks], None], float]] = {
    "dead": (dead_nccl, 5),
    "hung": (hung_nccl, 5),
    "unhurried": (unhurried_nccl, 3),
}
CASES: dict[str, tuple[Callable[[Ranks], None], float]] = {
    "dead": (dead, 1.5),
    "hung": (hung, 1.5),
    "woken": (woken, 1.5),
    "unnoticed": (unnoticed, 1.5),
    "unhurried": (unhurried, 3),
    "apart": (apart, 3),
}


def run(root: Path, name: str, case: tuple[Callable[[Ranks], None], float], device: DeviceName) -> None:
    work, timeout_s = case

    def rank(ranks: Ranks) -> None:
        file = os.open(root / f"{name}.{ranks.rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 2)
        work(ranks)

    started = time.monotonic()
    codes = fork_ranks(2, rank, timeout_s, device=device, heartbeat=device == "cpu" or None)
    seconds = time.monotonic() - started
    said = [(root / f"{name}.{number}").read_text() for number in range(2)]
    (root / f"{name}.json").write_text(json.dumps({"codes": codes, "said": said, "seconds": seconds}))


def main(root: Path, cases: dict[str, tuple[Callable[[Ranks], None], float]], device: DeviceName) -> None:
    # All at once: they mostly wait.
    pids = [fork(lambda n=name, c=case: run(root, n, c, device)) for name, case in cases.items()]  # type: ignore[misc]
    codes = wait_all(pids, 120)
    assert codes == [0] * len(cases), codes
    report = {name: json.loads((root / f"{name}.json").read_text()) for name in cases}
    (root / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    one_thread()
    if sys.argv[2:] == ["nccl"]:
        main(Path(sys.argv[1]), NCCL, "cuda")
    else:
        main(Path(sys.argv[1]), CASES, "cpu")
