"""What `tandemrec tune` has chosen for a preset and a log becomes the config that the league runs."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import tomli_w

from benchmarks.league.declared import RATES, config_of
from embeddings.errors import ConfigError
from trainer.sealed_folder import write_text

# Of the study's own machine, and set by the league for each run.
_DROPPED = {"data": "log", "train": "seed"}


def adopt(best: Path, log: str, preset: str, rates: Path = RATES) -> Path:
    """Write RATES/LOG/PRESET.toml: the keys of a study's `best.toml`, on top of the preset in configs/.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        with best.open("rb") as file:
            tree = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{best}: {error}") from None
    tree.pop("extends", None)
    for section, key in _DROPPED.items():
        tree.get(section, {}).pop(key, None)
    place = rates / log / f"{preset}.toml"
    # Relative, so that the file holds in any checkout.
    base = Path(os.path.relpath(config_of(preset).resolve(), place.parent.resolve())).as_posix()
    kept = {name: value for name, value in tree.items() if value != {}}
    place.parent.mkdir(parents=True, exist_ok=True)
    write_text(place, tomli_w.dumps({"extends": base, **kept}))
    return place
