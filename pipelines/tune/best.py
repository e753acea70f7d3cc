"""The best trial as a configuration that `train --config` takes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.train import placed
from pipelines.tune.literals import dotted, literal
from pipelines.tune.plan import StudyPlan
from pipelines.tune.space import overlap
from trainer.config.toml import Sources, flat_settings
from trainer.run_config import load_config
from trainer.storage import is_remote

_PARTS = (
    "What the study has chosen.",
    "What the study was given by --set. If some of it was only to make trials short, delete that, too.",
    "The budget of its trials. Without it training is as long as the base says. (Of --set, the keys of it.)",
)
_PLACES = "Places that the base names by their path from the folder in which the study was begun."


def best_toml(plan: StudyPlan, drawn: Mapping[str, Any], folder: Path, words: Sequence[str]) -> str:
    """The file; it extends the study's own configuration.

    Args:
        drawn: parameter -> what was drawn for it; folder: where the file will lie.
        words: how it was found, a line each.
    """
    overrides = plan.overrides(drawn)
    places = _places(plan, overrides)
    placing = [f"{key}={literal(place)}" for key, place in places.items()]
    tree = Sources.read(plan.config, (*overrides, *placing)).tree()
    chosen = overrides[len(plan.budget) + len(plan.given) :]
    budget = {_key_of(override) for override in plan.budget}
    given = [override for override in plan.given if _key_of(override) not in budget]
    lines = [f"# {word}" for word in words] + [f"extends = {literal(_from(folder, plan.config))}"]
    # A key that is set twice has one line, in the part of what was set last.
    written = set[str]()
    for title, part in zip(_PARTS, (chosen, given, plan.budget), strict=True):
        own = [line for line in _assignments(part, tree) if line.partition(" = ")[0] not in written]
        written |= {line.partition(" = ")[0] for line in own}
        lines += ["", f"# {title}", *own] if own else []
    left = [key for key in places if not any(overlap(key, each) for each in written)]
    own = [f"{dotted(key.split('.'))} = {literal(places[key])}" for key in left]
    lines += ["", f"# {_PLACES}", *own] if own else []
    return "\n".join([*lines, ""])


def _places(plan: StudyPlan, overrides: Sequence[str]) -> dict[str, str]:
    """Key -> absolute path, of each place that the configuration names by a path from the present folder."""
    settings = load_config(plan.config, overrides)
    there, here = (dict(flat_settings(each.model_dump(mode="json"))) for each in (placed(settings), settings))
    return {key: place for key, place in there.items() if place != here[key]}


def _key_of(override: str) -> str:
    return override.partition("=")[0].strip()


def _assignments(overrides: Sequence[str], tree: Mapping[str, Any]) -> Iterator[str]:
    """`key = value` of each override; where its key goes into a list, the whole list, as it is afterwards."""
    for override in overrides:
        value: Any = tree
        place: list[str] = []
        for part in _key_of(override).split("."):
            if not isinstance(value, Mapping):
                break
            place, value = [*place, part], value[part]
        yield f"{dotted(place)} = {literal(value)}"


def _from(folder: Path, config: Path) -> str:
    """A configuration as seen from a folder."""
    if is_remote(config):
        return str(config)
    return Path(os.path.relpath(config.resolve(), folder.resolve())).as_posix()
