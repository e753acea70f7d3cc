"""Small sequence logs that steps share; the same seed writes the same log."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu.check import Check
from tests.logs import Shape, random_rows, write_log

_SIDE_FEATURES = {"department_id": 3, "type_id": 9}


def small_log(check: Check) -> Path:
    """Short and empty histories beside long ones, with all features that the presets name."""
    path = check.work / "small-log"
    if path.exists():
        return path
    rows = random_rows(4, Shape(users=30))
    for row in rows:
        for feature, divisor in (("department_id", 3), ("type_id", 1)):
            row[f"history_{feature}"] = [category // divisor for category in row["history_category_id"]]
            row[f"candidate_{feature}"] = [
                [category // divisor for category in each] for each in row["candidate_category_id"]
            ]
    part = check.work / "small-log.part"
    write_log(part, {"train": rows, "validation": rows[:5]}, more=_SIDE_FEATURES)
    part.rename(path)
    return path
