"""The presets of configs/, on whatever log a test has."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.launching import ROOT
from trainer.log.schema import read_manifest
from trainer.run_config import load_config

# twin_v2 needs a clustered log and has tests of its own.
PRESETS = sorted(
    path.stem
    for path in (ROOT / "configs").glob("*.toml")
    if "extends" in path.read_text() and path.stem != "twin_v2"
)
# What presets name that a log of one label, `click`, has not got.
_RENAMED = {
    "esmm": ["tasks.conversion.label=click", "tasks.conversion_of_clicks.label=click"],
    **{
        preset: ["data.domain=category_id"]
        for preset in ("crocodile", "d_train", "d_train_joint", "d_train_pooled")
    },
}


def of_tasks(preset: str) -> bool:
    """Whether it has a tower for each task."""
    return load_config(ROOT / f"configs/{preset}.toml").model.head_kind.takes_towers


def renamed(preset: str, log: Path) -> list[str]:
    """Overrides with which a preset runs on this log."""
    return [] if "conversion" in read_manifest(log).tasks else _RENAMED.get(preset, [])
