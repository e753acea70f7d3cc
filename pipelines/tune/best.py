"""The best trial as a configuration that `train --config` takes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.tune.literals import dotted, literal
from pipelines.tune.plan import StudyPlan
from trainer.config.toml import Sources
from trainer.storage import is_remote

_PARTS = (
    "What the study has chosen.",
    "What the study was given by --set.",
    "The budget of its trials. Without these lines the configuration trains as long as its base says.",
)


def best_toml(plan: StudyPlan, drawn: Mapping[str, Any], folder: Path, words: Sequence[str]) -> str:
    """The file; it extends the study's own configuration.

    Args:
        drawn: parameter -> what was drawn for it; folder: where the file will lie.
        words: how it was found, a line each.
    """
    overrides = plan.overrides(drawn)
    tree = Sources.read(plan.config, overrides).tree()
    chosen = overrides[len(plan.budget) + len(plan.given) :]
    lines = [f"# {word}" for word in words] + [f"extends = {literal(_from(folder, plan.config))}"]
    # A key that is set twice has one line, in the part of what was set last.
    written = set[str]()
    for title, part in zip(_PARTS, (chosen, plan.given, plan.budget), strict=True):
        own = [line for line in _assignments(part, tree) if line.partition(" = ")[0] not in written]
        written |= {line.partition(" = ")[0] for line in own}
        lines += ["", f"# {title}", *own] if own else []
    return "\n".join([*lines, ""])


def _assignments(overrides: Sequence[str], tree: Mapping[str, Any]) -> Iterator[str]:
    """`key = value` of each override; where its key goes into a list, the whole list, as it is afterwards."""
    for override in overrides:
        value: Any = tree
        place: list[str] = []
        for part in override.partition("=")[0].strip().split("."):
            if not isinstance(value, Mapping):
                break
            place, value = [*place, part], value[part]
        yield f"{dotted(place)} = {literal(value)}"


def _from(folder: Path, config: Path) -> str:
    """A configuration as seen from a folder."""
    if is_remote(config):
        return str(config)
    return Path(os.path.relpath(config.resolve(), folder.resolve())).as_posix()
