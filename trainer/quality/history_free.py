"""What an ingest found out about candidates without any history: a line that every model must beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def history_free_entry(split: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """What ingest measured on a sample of a split without any history; {} where it did not.

    Args:
        report: of the log's manifest.
    """
    measured = report.get("history_free") or {}
    if split not in measured.get("auc", {}):
        return {}
    numbers = {name: measured[name][split] for name in ("auc", "popularity", "candidates")}
    return {"task": measured["task"], **numbers}


def history_free_line(split: str, report: Mapping[str, Any]) -> list[str]:
    """The line below the tables that a model must beat; none where ingest measured nothing."""
    entry = history_free_entry(split, report)
    if not entry:
        return []
    return [
        f"{entry['task']} without any history, at ingest: AUC {entry['auc']:.4f} of a small tree on the"
        f" candidates alone, {entry['popularity']:.4f} of popularity as of the request"
        f" ({entry['candidates']:,} candidates of {split})"
    ]
