"""Checkpoints as one process finds them."""

from __future__ import annotations

from pathlib import Path

from trainer.checkpoint.save_load import find


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were refused."""
    point = find(folder, alone=True)
    return point.path, point.refused
