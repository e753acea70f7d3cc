"""The presets of configs/, on whatever log a test has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from embeddings.groups import TableGroup
from tests.helpers.launching import ROOT
from tests.helpers.similarity import drawn_vectors, write_parquet
from trainer.data.similarity.given_rows import set_rows_of_vectors
from trainer.log.schema import read_manifest
from trainer.run_config import Config, load_config

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
    """Overrides with which a preset runs on this log, whose items it may need vectors of, 8 numbers each."""
    if preset == "muse":
        rows = read_manifest(log).features["item_id"].rows
        file = log.with_name(f"{log.name}-content.parquet")
        return [f"data.vectors.content.file={write_parquet(file, drawn_vectors(1, range(1, rows), 8))}"]
    return [] if "conversion" in read_manifest(log).tasks else _RENAMED.get(preset, [])


def fill_given(model: nn.Module, groups: Mapping[str, TableGroup], config: Config) -> None:
    """Put pre-trained rows into the tables of an unsharded model."""
    names = {name: group.vectors for name, group in config.groups.items()}
    weights = {f"{name}.weight": parameter.data for name, parameter in model.named_parameters()}
    set_rows_of_vectors(weights, groups, names, config.data, read_manifest(config.data.log))
