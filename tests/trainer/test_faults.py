"""Ranks that die, hang or fail again and again, under the supervision of torchrun."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.helpers.launching import SETTINGS, launched, losses, overrides, torchrun
from tests.helpers.logs import small_log
from tests.programs.drive import Fault, Plan
from tests.trainer.test_ranks import parameters
from trainer.checkpoint.background import Saver

STEPS, LIMIT_S = 40, 540
# Seconds on a machine of its own; a busy one may take ten times as long.
pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]


def plan(run: Path, log: Path, faults: Sequence[Fault], again: bool = False, **settings: Any) -> Plan:
    more = {"data.log": str(log), "train.epochs": 9, "train.max_steps": STEPS, "checkpoint.every_steps": 2}
    changed = {**SETTINGS, **more, **{key.replace("__", "."): value for key, value in settings.items()}}
    words = [word for word in overrides(changed) if word != "--set"]
    return Plan(str(run), "configs/dare.toml", words, list(faults), again)


def supervised(what: Plan, max_restarts: int, grace_s: float = 30) -> subprocess.CompletedProcess[str]:
    """Two ranks under torchrun's agent in a process of the tests."""
    file = str(what.write(Path(f"{what.run}.plan.json")))
    return launched("tests.programs.supervise", file, str(max_restarts), str(grace_s), timeout=LIMIT_S)


def under_torchrun(what: Plan, max_restarts: int) -> subprocess.CompletedProcess[str]:
    file = str(what.write(Path(f"{what.run}.plan.json")))
    return torchrun("tests.programs.drive", file, max_restarts=max_restarts, timeout=LIMIT_S)


def marks(run: Path, rank: int) -> list[tuple[float, str]]:
    """What a rank noted, with its time: `pid N`, steps done, and how it failed."""
    lines = Path(f"{run}.marks-{rank}").read_text(encoding="utf-8").splitlines()
    return [(float(when), what) for when, _, what in (line.partition(" ") for line in lines)]


def pids(run: Path) -> list[int]:
    return [int(what[4:]) for rank in (0, 1) for _, what in marks(run, rank) if what.startswith("pid ")]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def digest(run: Path) -> str:
    """SHA-256 over every tensor of the newest checkpoint, tables and optimizers included."""
    whole = hashlib.sha256()
    for name, tensor in sorted(parameters(run).items()):
        whole.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return whole.hexdigest()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("faults") / "log", seed=1, users=40)


@pytest.fixture(scope="module")
def unbroken(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    done = supervised(plan(run, log, []), 0)
    assert done.returncode == 0, done.stderr
    assert len(losses(run)) == STEPS
    return run


def random_faults(seed: int, count: int) -> list[Fault]:
    """Kills of either rank after random steps, every other one some milliseconds into what comes next."""
    rng = np.random.default_rng(seed)
    steps = sorted(rng.choice(np.arange(1, STEPS - 5), count, replace=False).tolist())
    delays = [int(rng.integers(1, 60)) * (number % 2) for number in range(count)]
    return [Fault(int(rng.integers(2)), step, "kill", ms) for step, ms in zip(steps, delays, strict=True)]


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_kill_9_at_five_random_steps_changes_no_bit(
    log: Path, unbroken: Path, tmp_path: Path, seed: int
) -> None:
    run, faults = tmp_path / "run", random_faults(seed, 5)
    done = supervised(plan(run, log, faults), 9)
    assert done.returncode == 0, done.stderr
    killed = [what for rank in (0, 1) for _, what in marks(run, rank) if what == "kill"]
    assert len(killed) == 5
    assert losses(run) == losses(unbroken)
    assert digest(run) == digest(unbroken)
    assert not (run / "starts.jsonl").exists()
    assert not [pid for pid in pids(run) if alive(pid)]


def test_kills_under_torchrun_itself(log: Path, unbroken: Path, tmp_path: Path) -> None:
    """First a rank, which it starts again, then torchrun, which no rank outlives; a new start goes on."""
    run = tmp_path / "run"
    done = under_torchrun(plan(run, log, [Fault(1, 6), Fault(0, 16, "kill_launcher")]), 4)
    assert done.returncode == -signal.SIGKILL, done.stderr
    end = time.monotonic() + 60
    while [pid for pid in pids(run) if alive(pid)]:
        assert time.monotonic() < end, "a rank trains on without its launcher"
        time.sleep(0.1)
    after = [what for _, what in marks(run, 1) if not what.startswith("pid")]
    again = after.index("kill") + 1
    assert after[again - 2] == "6" and int(after[again]) in range(1, 8), "from the last save on"
    assert 16 <= max(int(what) for _, what in marks(run, 0) if what.isdigit()) < STEPS
    done = supervised(plan(run, log, []), 0)
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(unbroken) and digest(run) == digest(unbroken)
    assert not [pid for pid in pids(run) if alive(pid)]


def test_the_rank_that_failed_is_named_and_not_those_that_only_lost_it(log: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = supervised(plan(run, log, [Fault(1, 3, "raise")]), 0)
    assert done.returncode == 1
    assert "[rank 1] tandemrec: internal error" in done.stderr
    cause = done.stderr[done.stderr.index("Root Cause (first observed failure)") :]
    assert "rank      : 1 (local_rank: 1)" in cause
    assert "internal error: ValueError: injected into rank 1 after step 3" in cause


def test_a_hung_rank_is_named_in_time_and_ended(log: Path, tmp_path: Path) -> None:
    """SIGSTOP: the other rank waits train.timeout_s, says for whom and where, and no process stays."""
    run = tmp_path / "run"
    done = supervised(plan(run, log, [Fault(1, 5, "stop")], train__timeout_s=3), 0, grace_s=2)
    ended = time.time()
    assert done.returncode == 1
    line = next(line for line in done.stderr.splitlines() if line.startswith("[rank 0] tandemrec: error"))
    assert "rank 0, after step 5: waited in vain for rank 1, which hangs, is dead or cut off" in line
    stopped = next(when for when, what in marks(run, 1) if what == "stop")
    # Nothing was trained after the stop, and the waiting ended at about the time asked for.
    assert not [when for when, what in marks(run, 0) if what.isdigit() and when > stopped + 3]
    # 3 s of waiting, 5 for answers, 2 of grace; a save under way asks for none of its own 60.
    assert ended - stopped < 60
    assert not [pid for pid in pids(run) if alive(pid)]


def test_a_save_that_needs_a_lost_rank_is_hardly_waited_for() -> None:
    """Its own collectives may wait for minutes; after another error its ranks are all there."""
    granted: list[float] = []
    saver = Saver.__new__(Saver)
    saver._running = SimpleNamespace(join=granted.append)  # type: ignore[assignment]
    for text in ("Connection reset by peer", "Timed out waiting 3000ms for send operation", "of the loss"):
        error = RuntimeError(text)
        saver.__exit__(type(error), error, None)
    reset, silent, other = granted
    assert reset == silent < 5 and other == 60


def test_a_restart_storm_ends_with_one_clear_error(log: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    storm = plan(run, log, [Fault(0, 4, "raise")], again=True, checkpoint__every_steps=0)
    done = supervised(storm, 7)
    assert done.returncode == 1
    assert sum(what == "raise" for _, what in marks(run, 0)) == 5, "started in vain more often than allowed"
    assert sum(what.startswith("pid") for _, what in marks(run, 0)) == 8
    refusal = "the last 5 starts began at step 0 and failed before a newer checkpoint"
    assert refusal in done.stderr[done.stderr.index("Root Cause") :]
    mended = plan(run, log, [], checkpoint__every_steps=0, train__max_steps=6)
    assert supervised(mended, 0).returncode == 0, "another configuration goes on by itself"
    assert not (run / "starts.jsonl").exists()


def test_an_error_of_all_ranks_is_said_once(log: Path, tmp_path: Path) -> None:
    changed = overrides({"data.log": str(log), "model.kk": 3})
    words = ["train", "--config", "configs/dare.toml", "--out", str(tmp_path / "r"), *changed]
    done = launched("tests.programs.supervise", "command", "0", "30", *words)
    assert done.returncode == 1
    problem = "--set model.kk=3: unknown key 'model.kk'; did you mean 'model.k'?"
    assert done.stderr.count(f"tandemrec: error: {problem}") == 1
    assert problem in done.stderr[done.stderr.index("Root Cause (first observed failure)") :]
    assert "Traceback" not in done.stderr[: done.stderr.index("tandemrec: error")]
