"""The scheduler for Slurm, with stand-ins for Slurm's commands; tests/cluster has the real ones."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from torchx.runner import get_runner
from torchx.schedulers import DEFAULT_SCHEDULER_MODULES
from torchx.specs import AppState

from launch.components import JobError, export, train
from launch.slurm import Slurm
from tests.helpers.launching import ROOT

CONFIG = str(ROOT / "configs/dare.toml")


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of Slurm's commands; no others are found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def stand_in(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


def request(**options: Any) -> Any:
    with get_runner() as runner:
        return runner.dryrun(train(config=CONFIG, out="/s/o", **options), "slurm", {}).request


def test_torchx_has_all_its_schedulers_and_ours() -> None:
    ours = {each.name: each.value for each in importlib.metadata.entry_points(group="torchx.schedulers")}
    theirs = {name: f"{module}:create_scheduler" for name, module in DEFAULT_SCHEDULER_MODULES.items()}
    assert ours == {**theirs, "slurm": "launch.slurm:create_scheduler"}


def test_the_controller_is_asked_and_sacct_for_what_it_forgot(commands: Path) -> None:
    slurm = Slurm("s")
    assert slurm.describe("7") is None and slurm.list() == []
    stand_in(commands, "squeue", "exit 1")
    stand_in(commands, "sacct", "printf '7+1|FAILED|a-1|n2\\n7+0|CANCELLED by 1000|a-0|n1\\n'")
    told = slurm.describe("7")
    assert told is not None and (told.state, told.msg) == (AppState.CANCELLED, "CANCELLED by 1000")
    (status,) = told.roles_statuses
    assert [(each.id, each.state, each.hostname) for each in status.replicas] == [
        (0, AppState.CANCELLED, "n1"),
        (1, AppState.FAILED, "n2"),
    ]
    stand_in(commands, "squeue", "printf '7+0|PENDING|a-0||PartitionTimeLimit\\n8|COMPLETING|b-0|n1|None\\n'")
    told = slurm.describe("7")
    assert told is not None and (told.state, told.msg) == (AppState.PENDING, "PENDING PartitionTimeLimit")
    assert [(each.app_id, each.state) for each in slurm.list()] == [
        ("7", AppState.PENDING),
        ("8", AppState.RUNNING),
    ]


def test_what_will_not_have_its_effect_is_said(
    commands: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(commands, "python", "")
    stand_in(commands, "sinfo", "printf 'PARTITION,MEMORY\\nall*,1\\n'")
    stand_in(commands, "scontrol", "echo 'MinJobAge               = 300 sec'")
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    request(j="2:4x1")
    said = capsys.readouterr().err
    for words in (
        "the least number of nodes has no effect: it starts on all 4",
        "--memMB has no effect",
        f"`python` on your PATH is {commands}/python, and the nodes take that one",
        "SBATCH_EXPORT keeps your environment from the nodes",
        "no accounts are kept here (sacct not found)",
        "know a job only for 300 s after its end",
    ):
        assert words in said, said
    stand_in(commands, "sacct", "")
    monkeypatch.delenv("SBATCH_EXPORT")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    stand_in(commands, "sinfo", "printf 'PARTITION,MEMORY\\nall*,4000\\n'")
    request(j="2x1")
    assert "slurm:" not in capsys.readouterr().err


def test_a_job_that_may_be_retried_gets_sigterm_before_its_time_ends(commands: Path) -> None:
    script = request(j="2x1", max_retries=1).materialize()
    assert sum("--signal=TERM@120" in line for line in script.splitlines()) == 2
    assert "SLURM_UNBUFFEREDIO" not in script and "export PYTHONUNBUFFERED=1" in script
    assert "--signal" not in request(j="2x1").materialize()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"config": "configs/dar.toml"}, r"--config configs/dar\.toml: no such file"),
        ({"name": "a/b"}, "--name a/b: it names files"),
        ({"mounts": ["type=bind", "src=/a", "dst=/b"]}, "--mounts: Slurm has none"),
    ],
)
def test_what_no_slurm_can_do_is_refused(commands: Path, options: dict[str, Any], problem: str) -> None:
    del commands
    job = train(**{"config": CONFIG, "out": "/s/o", **options})
    with get_runner() as runner, pytest.raises(JobError, match=problem):
        runner.dryrun(job, "slurm", {})


def test_without_slurm_it_says_where_to_submit(commands: Path) -> None:
    with get_runner() as runner, pytest.raises(JobError, match="sbatch not found: submit where"):
        runner.schedule(runner.dryrun(train(config=CONFIG, out="/s/o"), "slurm", {}))


def test_what_is_said_of_a_job_suits_it_and_the_partitions(
    commands: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(commands, "sbatch", "echo 7")
    with get_runner() as runner:
        for job, words in (
            (train(config=CONFIG, out="/s/o"), "to stop it, with a checkpoint: scancel 7"),
            (export(run="/s/o", out="/s/snap"), "to stop it: scancel 7"),
        ):
            runner.schedule(runner.dryrun(job, "slurm", {}))
            assert words in capsys.readouterr().err
        stand_in(commands, "sbatch", "exit 1")
        stand_in(commands, "sinfo", "echo 'all: 2 node(s) with 2 cores, 4000 MB, (null), for at most 10:00'")
        with pytest.raises(JobError, match="4000 MB, no GPUs, for at most"):
            runner.schedule(runner.dryrun(train(config=CONFIG, out="/s/o"), "slurm", {}))
