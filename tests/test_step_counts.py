"""Regression guard of a step's cost by counts, which are the same on every machine; never by times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT
from tests.logs import small_log

Counts = dict[str, int]
# Today's counts of the third step of configs/dare.toml, cut down as in tests/step_cases.py.
LIMITS: dict[int, list[Counts]] = {}
ADVICE = (
    "A step of configs/dare.toml calls, sends or looks up more than before. If that is meant, say in the commit "
    "why it is worth it, and set LIMITS in tests/test_step_counts.py to\n"
)


def counted(log: Path, out: Path, ranks: int) -> list[Counts]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, "-m", "tests.step_counts", str(log), str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[Counts] = json.loads(out.read_text())["ranks"]
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_costs_no_more_than_it_did(tmp_path: Path, ranks: int) -> None:
    log = small_log(tmp_path / "log", seed=2, users=24)
    found = counted(log, tmp_path / "counts.json", ranks)
    for mine, limit in zip(found, LIMITS[ranks], strict=True):
        assert mine.keys() == limit.keys()
        more = {name: f"{limit[name]} -> {mine[name]}" for name in mine if mine[name] > limit[name]}
        assert not more, f"{more}\n{ADVICE}{ranks}: {found}"


def test_the_guard_sees_what_a_step_does() -> None:
    """One rank sends nothing for its tables; two send ids, vectors and gradients, and look up as many rows."""
    (one,), two = LIMITS[1], LIMITS[2]
    assert one["bytes of ids"] == one["bytes of vectors"] == one["bytes besides"] == 0
    assert all(mine["bytes of ids"] > 0 and mine["bytes of vectors"] > 0 for mine in two)
    assert sum(mine["attention rows"] for mine in two) == one["attention rows"]
    assert sum(mine["representation rows"] for mine in two) == one["representation rows"]
