"""The losses by their names in a config: a new one is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from embeddings.errors import ConfigError, hint_of
from trainer.objectives.bce import bce
from trainer.objectives.focal import focal, negative_sums
from trainer.objectives.jrc import everyone, jrc
from trainer.objectives.list import list_loss, positives
from trainer.objectives.listce import listce
from trainer.objectives.losses import Objective
from trainer.objectives.pair import pair, pairs
from trainer.objectives.ranking import Ranking

OBJECTIVES: dict[str, Objective] = {
    "bce": Objective(bce),
    "focal": Objective(focal, negative_sums, gamma=True),
}
"""The objectives, by their names in `train.objective` and `tasks.NAME.loss`."""
RANKINGS: dict[str, Ranking] = {
    "pair": Ranking(pair, pairs),
    "list": Ranking(list_loss, positives),
    "listce": Ranking(listce, positives),
    "jrc": Ranking(jrc, everyone, two_logits=True),
}
"""The ranking losses, by their names in `tasks.NAME.rank`."""

Entry = TypeVar("Entry", Objective, Ranking)


def objective_of(name: str, key: str = "train.objective") -> Objective:
    """`key`: where the name stands, for the message.

    Raises:
        ConfigError: there is no such objective.
    """
    return _entry(OBJECTIVES, name, key, "objective")


def ranking_of(name: str, key: str) -> Ranking:
    """The same of a ranking loss."""
    return _entry(RANKINGS, name, key, "ranking loss")


def _entry(table: Mapping[str, Entry], name: str, key: str, what: str) -> Entry:
    if name in table:
        return table[name]
    hint = hint_of(name, table, f"known here: {', '.join(sorted(table))}")
    raise ConfigError(f"{key} = {name!r}: no such {what}; {hint}")
