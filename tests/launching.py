"""Starting the command line in fresh processes, on one rank or several, with a time limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Two groups of unequal width, many steps from little data.
SETTINGS = {
    "data.history_length": 16,
    "data.batch_candidates": 24,
    "data.requests_per_block": 2,
    "data.shuffle_row_groups": 2,
    "model.k": 4,
    "model.hidden": [8],
    "groups.attention.dim": 4,
    "groups.representation.dim": 8,
    "train.log_every": 1,
    "train.warmup_steps": 3,
}


def overrides(settings: dict[str, Any]) -> list[str]:
    return [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def tandemrec(*words: str, ranks: int = 1, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run the command line, under torchrun where `ranks` > 1."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*command, "-m", "launch.cli", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def train(log: Path, run: Path, ranks: int = 1, preset: str = "dare", **settings: Any) -> list[float]:
    """Train a preset on a log; returns the loss of every step."""
    changed = {"data.log": str(log), **SETTINGS, **{k.replace("__", "."): v for k, v in settings.items()}}
    if preset == "twin_paper_dare":
        changed = {k: v for k, v in changed.items() if not k.startswith(("groups.a", "groups.r"))}
    done = tandemrec(
        "train", "--config", f"configs/{preset}.toml", "--out", str(run), *overrides(changed), ranks=ranks
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(run)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"]
