"""Starting a benchmark once more, on two ranks (gloo, one thread each)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.options import Options

RANKS = 2
_ROOT = Path(__file__).parent.parent.parent


def add_rank_of(options: Options) -> None:
    """The option by which a process learns that it is one of the ranks, and the folder that they share."""
    options.add_argument("--rank-of", type=Path, help="be one of the ranks, with its files in this folder")


def start_ranks(bench: str, folder: Path, words: Sequence[str], seconds: int) -> None:
    """Run `bench` with `words` on two ranks, until both have ended.

    Raises:
        subprocess.CalledProcessError: one of them failed.
        subprocess.TimeoutExpired: they took longer than `seconds`.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    subprocess.run(
        [sys.executable, *launcher, "-m", "benchmarks", bench, "--rank-of", str(folder), *words],
        cwd=_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=seconds,
    )
