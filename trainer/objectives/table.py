"""The objectives by their names in `train.objective`: a new one is a file beside this one and a line here."""

from __future__ import annotations

import difflib

from embeddings.errors import ConfigError
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
    near = difflib.get_close_matches(name, OBJECTIVES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(OBJECTIVES))}"
    raise ConfigError(f"train.objective = {name!r}: no such objective; {hint}")
