"""The numbers of a figure as JSON: unrounded, and null where there is no value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from pipelines.analyze.report.model import Figure, Table

FORMAT = "tandemrec.figure"


def json_of(figure: Figure | Table) -> str:
    """One JSON object a figure: its name, title and caption, and every number that is drawn."""
    return json.dumps({"format": FORMAT, "version": 1, **plain(figure)}, indent=1, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """Records as objects with their `kind`; NaN and infinity have no JSON form and become null."""
    if is_dataclass(value):
        kind = {"kind": type(value).__name__.lower()}
        return kind | {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
