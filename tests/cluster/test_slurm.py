"""Jobs on a real Slurm of two nodes (slurm.py): submitted with TorchX, hit by what hits nodes, resumed."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.machines import SCRATCH, wait_until
from tests.cluster.slurm import Slurm, obstacle, slurm
from tests.helpers.checkpoints import newest
from tests.helpers.launching import ROOT, SETTINGS, losses
from tests.helpers.launching import train as train_here
from tests.helpers.logs import small_log
from tests.trainer.test_faults import digest

WHY_NOT = obstacle()
pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.slow,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"no Slurm here: {WHY_NOT}"),
]
# The environment that a user has activated; what is private to a node is on its own disk.
ACTIVE = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TMPDIR": SCRATCH}
TRAINED: dict[str, Any] = {
    "train.max_steps": 60,
    "train.epochs": 1000,
    "train.timeout_s": 10,
    "checkpoint.every_steps": 4,
    "checkpoint.check_every": 1,
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("slurm") / "log", seed=1, users=40)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    with slurm() as made:
        yield made


class Submitted:
    """A training job of one rank on each of two nodes."""

    def __init__(self, cluster: Slurm, log: Path, folder: Path, *options: str, **settings: Any) -> None:
        self.cluster, self.folder, self.run = cluster, folder, folder / "run"
        changed = {**SETTINGS, **TRAINED, "data.log": str(log)}
        changed |= {key.replace("__", "."): value for key, value in settings.items()}
        component = [f"{ROOT}/launch/components.py:train", "--config", f"{ROOT}/configs/dare.toml"]
        here = ["--out", str(self.run), "-j", "2x1", "--cpu", "2", "--memMB", "2000", *options, "--"]
        words = [f"{key}={json.dumps(value)}" for key, value in changed.items()]
        self.told = self.torchx("run", "-s", "slurm", *component, *here, *words)
        self.job = self.told[0].strip().rpartition("/")[2]

    def torchx(self, *words: str) -> tuple[str, str]:
        done = self.cluster.on_head("torchx", *words, env=ACTIVE, cwd=self.folder, check=False)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
        return done.stdout, done.stderr

    def said(self, node: int, kind: str = "out") -> str:
        file = self.folder / f"slurm-{self.job}-tandemrec-{node}.{kind}"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def steps(self) -> int:
        return len(losses(self.run)) if (self.run / "metrics.jsonl").exists() else 0

    def wait_for_step(self, step: int) -> None:
        wait_until(f"step {step}: {self.said(0, 'err')}", lambda: self.steps() >= step, 300, every=0.05)


def test_a_node_dies_and_the_requeued_job_ends_with_the_same_bits(
    cluster: Slurm, log: Path, tmp_path: Path
) -> None:
    job = Submitted(cluster, log, tmp_path, "--max_retries", "1")
    # What the user is told before and after the submission.
    assert "no accounts are kept here (Slurm accounting storage is disabled)" in job.told[1]
    assert f"{tmp_path}/slurm-{job.job}-tandemrec-0.out" in job.told[1]
    job.wait_for_step(10)
    nodes = cluster.on_head("squeue", "--noheader", "--format=%i %N %T", "--jobs", job.job).stdout
    assert nodes.split("\n")[:2] == [f"{job.job}+0 node-a RUNNING", f"{job.job}+1 node-b RUNNING"]
    assert "RUNNING" in job.torchx("status", f"slurm://torchx/{job.job}")[0]
    cluster.power_cut("node-b")
    # While Slurm finds out: what an undisturbed training on one machine gives.
    settings = {key.replace(".", "__"): value for key, value in TRAINED.items()}
    undisturbed = train_here(log, tmp_path / "undisturbed", ranks=2, **settings)
    cluster.wait(job.job, "PENDING", seconds=60)
    assert job.steps() < TRAINED["train.max_steps"]
    cluster.boot("node-b")
    assert cluster.wait(job.job, "COMPLETED", "FAILED", seconds=300) == "COMPLETED", job.said(0, "err")
    assert cluster.job(job.job)["Restarts"] == "1"
    # The second start has added to the output of the first, where the user was told.
    assert job.said(0).count("sharding plan for 2 rank(s)") == 2 and "resumed from" in job.said(0)
    assert "\x1b" not in job.said(0), "no terminal, so no bars that redraw themselves"
    assert job.torchx("log", "--streams", "stdout", f"slurm://torchx/{job.job}/tandemrec/0")[0].count(
        "resumed from"
    )
    assert losses(job.run) == undisturbed
    assert digest(job.run) == digest(tmp_path / "undisturbed")


def test_a_dead_rank_is_retried_and_scancel_saves_also_with_a_full_disk(
    cluster: Slurm, log: Path, tmp_path: Path
) -> None:
    # What is a node's own and not the run's: TMPDIR, for which Python then takes /tmp or the job's folder.
    cluster.fill("node-b")
    job = Submitted(cluster, log, tmp_path, "--max_retries", "1", train__max_steps=100_000)
    job.wait_for_step(6)
    # Slurm itself sees a job that failed; that it starts again is our --max_retries.
    cluster.kill("node-b", "launch.cli train")
    cluster.wait(job.job, "PENDING", seconds=60)
    before = job.steps()
    job.wait_for_step(before + 3)
    assert cluster.job(job.job)["Restarts"] == "1"
    cluster.on_head("scancel", job.job)
    cluster.wait(job.job, "CANCELLED", seconds=40)
    wait_until("the ranks have ended", lambda: "continues it" in job.said(0), 20)
    path, refused = newest(job.run / "checkpoints")
    assert path is not None and not refused
    assert path.name == f"step-{job.steps():08d}", "the last step is saved, due or not"
    assert not (job.run / "starts.jsonl").exists(), "a job that is stopped is no failed start"
    assert "CANCELLED" in job.torchx("status", f"slurm://torchx/{job.job}")[0]


def test_without_its_slurmd_a_node_trains_on_until_slurm_misses_it_and_all_is_saved(
    cluster: Slurm, log: Path, tmp_path: Path
) -> None:
    job = Submitted(cluster, log, tmp_path, train__max_steps=100_000)
    job.wait_for_step(6)
    cluster.kill("node-b", "slurmd -L")
    before = job.steps()
    # The job's other node gets SIGTERM, which all ranks agree on.
    cluster.wait(job.job, "PENDING", seconds=120)
    stopped = job.steps()
    assert stopped > before + 5 and f"stopped after step {stopped} as asked, and saved" in job.said(0)
    path, refused = newest(job.run / "checkpoints")
    assert path is not None and not refused and path.name == f"step-{stopped:08d}"
    assert cluster.job(job.job)["Restarts"] == "1"
    cluster.on_head("scancel", job.job)
    cluster.boot("node-b")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["-cfg", "partition=gpux"], r"Slurm has refused the job.*all: 2 node\(s\) with 2 cores, 4000 MB"),
        (["--memMB", "5000"], "Slurm has refused the job, for the reason above"),
    ],
)
def test_what_slurm_cannot_do_is_a_message(
    cluster: Slurm, tmp_path: Path, options: list[str], problem: str
) -> None:
    split = 2 if options[0] == "-cfg" else 0
    words = ["torchx", "run", "-s", "slurm", *options[:split], f"{ROOT}/launch/components.py:train"]
    words += ["--config", f"{ROOT}/configs/dare.toml", "--out", "o", "-j", "2x1", "--cpu", "2"]
    words += options[split:]
    done = cluster.on_head(*words, env=ACTIVE, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert re.search(problem, done.stderr, re.DOTALL) and "Traceback" not in done.stderr, done.stderr
