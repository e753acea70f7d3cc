"""Whether a run that is killed at random moments ends with the same bits as one that is not

Trains a config twice on one rank: once undisturbed, and once killed (SIGKILL) up to --kills times, at moments
that are drawn from its steps, and started again each time. Compared are all tensors of the newest checkpoint,
and all lines of metrics.jsonl but for their times. Runs lie beside the file of --json, or in the current
folder, and are removed.

With --stream both are trainings of a stream (`tandemrec online`) that publish versions. Compared is also what
became of each window, that each was trained once, and that versions rise by one and are those of the same
steps.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report
from embeddings.errors import TandemError
from trainer.checkpoint.files import checkpoints, read_state
from trainer.checkpoint.tensors import TensorReader
from trainer.data.stream.ledger import Ledger

_COLUMNS = {"kill": "{kill}", "after step": "{after:,}", "saved steps": "{steps:,}", "phase": "{phase}"}
# What a line of metrics says of time.
_TIMES = ("samples_per_s",)
# A kill comes at most so long after its step.
_WITHIN_S = 0.3


def main(words: Sequence[str]) -> int:
    options = Options("kills", __doc__).measuring(config=True, repeats=1)
    options.add_argument("--kills", type=int, default=10, help="how many times the second run is killed")
    options.add_argument("--seed", type=int, default=0, help="of the moments")
    options.add_argument("--stream", type=Path, help="train this stream instead of a log")
    given = options.read(words)
    report = Report(given, "Kills", seed=given.seed, n=given.kills)
    place = given.json.parent if given.json is not None else Path.cwd()
    with tempfile.TemporaryDirectory(dir=place, prefix="bench-") as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        _train(given, whole)
        last = json.loads((whole / "summary.json").read_text())["steps"]
        rng = np.random.default_rng(given.seed)
        for number, step in enumerate(sorted(rng.integers(1, last + 1, given.kills).tolist()), 1):
            _train(given, killed, step, float(rng.uniform(0.0, _WITHIN_S)))
            report.rows.append({"kill": number, "after": step, **_place(killed)})
        _train(given, killed)
        problems = _differences(whole, killed)
        if given.stream is not None:
            problems += _of_windows(whole, killed)
    report.table(_COLUMNS, report.rows)
    report.line(
        f"{len(report.rows)} kills; " + ("; ".join(problems) or "weights, states and metrics: same bits")
    )
    report.facts = {"kills": len(report.rows), "differences": problems}
    report.close()
    return int(bool(problems))


def _train(given: Any, out: Path, kill_after: int | None = None, delay: float = 0.0) -> None:
    """Train to the end, or until so many seconds after a step has been reported."""
    words = [sys.executable, "-m", "launch.cli", "train" if given.stream is None else "online"]
    words += ["--config", str(given.config), "--out", str(out)]
    if given.stream is not None:
        words += ["--stream", str(given.stream), "--snapshots", str(_versions(out))]
    # Many kills may come before the first save.
    for override in (*given.overrides, "train.log_every=1", "train.max_starts_without_progress=0"):
        words += ["--set", override]
    with tempfile.TemporaryFile() as said, subprocess.Popen(words, stdout=said, stderr=said) as run:
        while kill_after is not None and run.poll() is None:
            time.sleep(0.01)
            if _reported(out) >= kill_after:
                time.sleep(delay)
                run.kill()
        if run.wait() not in (0, -signal.SIGKILL):
            said.seek(0)
            raise TandemError(f"training failed: {said.read().decode(errors='replace')[-2000:]}")


def _reported(run: Path) -> int:
    """The newest step in the lines of metrics; 0 before the first."""
    file = run / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def _place(run: Path) -> dict[str, Any]:
    """What the newest checkpoint says of where it stands."""
    found = checkpoints(run / "checkpoints")
    state = read_state(found[0]) if found else {}
    return {"steps": state.get("step", 0), "phase": state.get("phase_name", "")}


def _differences(one: Path, two: Path) -> list[str]:
    """What is not the same in two runs, by its name."""
    before, after = (_tensors(checkpoints(run / "checkpoints")[0]) for run in (one, two))
    others = sorted(before.keys() ^ after.keys())
    found = [f"other tensors: {', '.join(others)}"] if others else []
    found += [name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])]
    # A kill between a version and its line costs the line, not the version, which is looked at by itself.
    lines = [[line for line in _lines(run) if line["split"] != "version"] for run in (one, two)]
    return found + (["metrics.jsonl"] if lines[0] != lines[1] else [])


def _versions(run: Path) -> Path:
    return run.with_name(f"{run.name}-versions")


def _of_windows(one: Path, two: Path) -> list[str]:
    """What is not the same of windows and versions, or not as it should be."""
    taken, steps = [], []
    for run in (one, two):
        state = read_state(checkpoints(run / "checkpoints")[0])["stream"]["ledger"]
        taken.append([(each.name, each.outcome, each.step) for each in Ledger.of_state(state).entries])
        manifests = [path / "manifest.json" for path in sorted(_versions(run).glob("v*"))]
        versions = [json.loads(path.read_text()) for path in manifests]
        steps.append([(each["number"], each["step"]) for each in versions])
    trained = [name for name, outcome, _ in taken[1] if outcome == "trained"]
    problems = {
        "windows": taken[0] != taken[1],
        "a window was trained twice": trained != sorted(set(trained)),
        "versions": steps[0] != steps[1],
        "versions do not rise": [number for number, _ in steps[1]] != list(range(1, len(steps[1]) + 1)),
    }
    return [problem for problem, there in problems.items() if there]


def _lines(run: Path) -> list[dict[str, Any]]:
    parsed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in _TIMES} for line in parsed]


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = TensorReader(folder)
    return {name: reader.whole(name) for name in reader.saved_names()}
