"""Two machines with their own networks (machines.py), without a scheduler: torchrun on each, as by hand."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.machines import SCRATCH, Network, network, obstacle, wait_until
from tests.helpers.checkpoints import newest
from tests.helpers.launching import ROOT, SETTINGS, losses, overrides
from tests.helpers.launching import train as train_here
from tests.helpers.logs import small_log
from tests.trainer.test_faults import digest

WHY_NOT = obstacle()
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.slow,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"no machines apart here: {WHY_NOT}"),
]
NODES = ("node-a", "node-b")
TRAINED: dict[str, Any] = {
    "train.max_steps": 60,
    "train.epochs": 1000,
    "train.timeout_s": 5,
    "checkpoint.every_steps": 4,
    "checkpoint.check_every": 1,
}


@pytest.fixture
def apart() -> Iterator[Network]:
    with network(("switch", *NODES)) as made:
        yield made


def start(apart: Network, log: Path, run: Path) -> list[subprocess.Popen[str]]:
    """One rank on each node; what a node prints is in RUN.NODE."""
    options = ["--rdzv-backend=c10d", "--rdzv-endpoint=node-a:29500", "--rdzv-id=apart"]
    options += ["--nnodes=2", "--nproc-per-node=1"]
    words = ["train", "--config", "configs/dare.toml", "--out", str(run)]
    settings = overrides({**SETTINGS, **TRAINED, "data.log": str(log)})
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "--", "launch.cli"]
    own = {"OMP_NUM_THREADS": "1", "TMPDIR": SCRATCH}
    started = []
    for node in NODES:
        with open(f"{run}.{node}", "a", encoding="utf-8") as said:
            machine = apart.machines[node]
            started.append(
                machine.start(*command, *words, *settings, env=own, cwd=ROOT, stdout=said, stderr=said)
            )
    return started


def test_a_cut_cable_ends_both_ranks_in_time_and_a_restart_gives_the_same_bits(
    apart: Network, tmp_path: Path
) -> None:
    log, run = small_log(tmp_path / "log", seed=1, users=40), tmp_path / "run"

    def said(node: str) -> str:
        return Path(f"{run}.{node}").read_text(encoding="utf-8")

    def steps() -> int:
        return len(losses(run)) if (run / "metrics.jsonl").exists() else 0

    agents = start(apart, log, run)
    wait_until("step 10", lambda: steps() >= 10, 100, every=0.05)
    apart.cut("node-b")
    # While the ranks wait: what an undisturbed training on one machine gives.
    settings = {key.replace(".", "__"): value for key, value in TRAINED.items()}
    undisturbed = train_here(log, tmp_path / "undisturbed", ranks=2, **settings)
    # torch's store is on node-a: for node-b it is silent, and the kernel takes minutes to say so.
    for rank, node in enumerate(NODES):
        line = rf"\[rank {rank}\] .*rank {rank}, after step \d+: waited in vain for rank {1 - rank}"
        wait_until(f"{line} in {said(node)}", lambda: re.search(line, said(node)), 40)  # noqa: B023
        wait_until("the rank has ended", lambda: not apart.machines[node].runs("-u -m launch.cli"), 10)  # noqa: B023
    assert agents[0].wait(20) == 1
    # torchrun itself waits on for the store; a scheduler ends it, or a person.
    apart.machines["node-b"].kill("torch.distributed.run")
    assert agents[1].wait(20) != 0
    assert steps() < TRAINED["train.max_steps"]
    path, refused = newest(run / "checkpoints")
    assert path is not None and not refused
    # Any one machine holds all that is needed; as many ranks as before give the same bits.
    begun = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    assert train_here(log, run, ranks=2, **settings) == undisturbed
    resumed = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert resumed[:3] == begun, "with the speeds of then: it was no new start"
    assert digest(run) == digest(tmp_path / "undisturbed")
