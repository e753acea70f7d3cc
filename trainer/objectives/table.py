"""The objectives by their names in `train.objective`: a new one is a file beside this one and a line here."""

from __future__ import annotations

from embeddings.errors import ConfigError, hint_of
from trainer.objectives.bce import bce
from trainer.objectives.losses import Objective

OBJECTIVES: dict[str, Objective] = {
    "bce": bce,
}
"""The objectives, by their names in `train.objective`."""


def objective_of(name: str) -> Objective:
    """Raises:
    ConfigError: there is no such objective.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    hint = hint_of(name, OBJECTIVES, f"known here: {', '.join(sorted(OBJECTIVES))}")
    raise ConfigError(f"train.objective = {name!r}: no such objective; {hint}")
