"""What an experiment on a planted log is: models, what is measured of each, and what a paper expects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from trainer.quality.metrics import logloss
from trainer.quality.scored import Scored

Floats = npt.NDArray[np.float64]
Values = Mapping[str, float]
# Values of every model, by its name, of one seed.
ByModel = Mapping[str, Values]


@dataclass(frozen=True)
class Measured:
    """A trained model on the test split.

    Attributes:
        scored: its candidates; truth: the columns of the log's truth, in the same order.
        covariance, correlation: their mean size, of an element of one expert and one of another; NaN with one
            expert.
        tables: the representation's tables, table -> [rows, dim], without the row of the unknown id.
        negatives: of each step of the training, the norm of the loss's gradient with respect to the logits of
            the candidates without a click.
        shares: of each merge of branches, what it took of each by its name.
        learned: task -> logloss on the training split, of the checkpoint that is measured.
    """

    scored: Scored
    truth: Mapping[str, npt.NDArray[np.generic]]
    covariance: float
    correlation: float
    tables: Mapping[str, Floats]
    negatives: Sequence[float]
    shares: Sequence[Mapping[str, float]] = ()
    learned: Values = field(default_factory=dict)

    def logloss(self, task: str, where: npt.NDArray[np.bool_] | None = None) -> float:
        """Of the observed candidates, or of those `where` it is asked for."""
        return logloss_of(self.scored, task, where)


def logloss_of(scored: Scored, task: str, where: npt.NDArray[np.bool_] | None = None) -> float:
    """Of the observed candidates of a split, or of those `where` it is asked for."""
    place = scored.tasks.index(task)
    score, label = scored.score[:, place], scored.label[:, place]
    chosen = ~np.isnan(label) if where is None else ~np.isnan(label) & where
    return logloss(score[chosen], label[chosen])


@dataclass(frozen=True)
class Experiment:
    """Models on one planted log; the seed of the log is that of the model.

    Attributes:
        kind: of the log; paper: whose expectation is tested.
        models: name -> overrides of several.toml.
        measure: what is kept of a trained model.
        claims: sentence -> whether it holds, for the values of all models with one seed.
        tied: models whose experts all use the weights of the first one.
        users: to train on, 0 = the kind's own number.
    """

    kind: str
    paper: str
    models: Mapping[str, Sequence[str]]
    measure: Callable[[Measured], Values]
    claims: Mapping[str, Callable[[ByModel], bool]]
    tied: frozenset[str] = frozenset()
    users: int = 0
    overrides: Sequence[str] = field(default=())
