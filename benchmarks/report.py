"""What every `bench NAME --json F` leaves behind."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embeddings.errors import ConfigError
from trainer.ranks.machine import cores
from trainer.run_folder import versions
from trainer.sealed_folder import write_text


def required(config: Path | None) -> Path:
    """The configuration that a benchmark measures with.

    Raises:
        ConfigError: none was given.
    """
    if config is None:
        raise ConfigError("this benchmark measures with a configuration: give --config")
    return config


def write_report(
    path: Path, rows: Sequence[Mapping[str, Any]], ratios: Mapping[str, float], facts: Mapping[str, Any]
) -> None:
    """One JSON object: ratios are the result, rows the measurements, facts what they were made on."""
    machine = {"platform": platform.platform(), "processor": platform.processor() or platform.machine()}
    tree = {
        "ratios": dict(ratios),
        "rows": [dict(row) for row in rows],
        "facts": dict(facts),
        "machine": machine,
        "versions": versions(),
    }
    write_text(path, json.dumps(tree, indent=1))


def provenance(seed: int, repeats: int) -> list[str]:
    """What every table ends with: machine and its load, versions, commit, command, seed and n."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return [
        f"{(named or [platform.machine()])[0]}, {cores()} cores, load {load}, {platform.platform()}",
        "; ".join(f"{name} {version}" for name, version in versions().items()),
        f"commit {_commit()}; seed {seed}; n = {repeats}; tandemrec {' '.join(sys.argv[1:])}",
    ]


def _commit() -> str:
    """Of the checkout that runs, `+` where it was changed; `unknown` outside of one."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
