"""Running the GPU check as a user does, and reading what it found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.launching import ROOT

Lines = dict[str, dict[str, Any]]


def lines_of(out: Path) -> Lines:
    """Step -> its line of the results."""
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in found if "step" in line}


def run_check(folder: Path, *words: str, timeout: float) -> tuple[Lines, str]:
    """`python -m benchmarks.gpu WORDS` with its results in a folder; -> the lines, and what was printed."""
    places = ["--out", str(folder / "out"), "--work", str(folder / "work")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *places, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    log = folder / "out" / "log.txt"
    said = log.read_text()[-6000:] if log.exists() else ""
    return lines_of(folder / "out"), f"{done.stdout}\n{done.stderr}\n{said}"
