"""What every `bench NAME --json F` leaves behind."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embeddings.errors import ConfigError
from trainer.durable import write_text
from trainer.run import versions


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
