"""Small sequence logs that steps share; the same seed writes the same log."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu.check import Check
from tests.trainer.test_presets import preset_log


def small_log(check: Check) -> Path:
    """Short and empty histories beside long ones, with all features that the presets name."""
    path = check.work / "small-log"
    if not path.exists():
        preset_log(check.work / "small-log.part").rename(path)
    return path
