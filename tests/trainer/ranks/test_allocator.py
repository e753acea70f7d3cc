"""Memory that a step frees is there for the next one, without the system mapping it anew."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.launching import ROOT

COUNT = """
import resource
from pathlib import Path
from benchmarks.scaling import Point, training_step
from trainer.ranks.process_group import process_group
with process_group() as ranks:
    step = training_step(Point(length=2_000), 7, ranks, Path("."))
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        step()
    print("faults", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_not_mapped_again() -> None:
    words = [sys.executable, "-c", COUNT]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 15_000
