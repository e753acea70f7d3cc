"""A pair loss beside binary cross entropy, where 25, 5 or 1 % of the candidates are clicked."""

from __future__ import annotations

from statistics import fmean
from typing import Final

import numpy as np

from benchmarks.planted.experiments.experiment import Experiment, Measured, Values

# Steps whose gradients are compared, about the second epoch: until then the bias learns the rate of clicks.
STEPS: Final = slice(80, 160)


def _measure(of: Measured) -> Values:
    """PCOC is over the sum of the true probabilities: that of the few labels is a matter of chance."""
    metrics = of.scored.metrics()
    return {
        "AUC": metrics.auc,
        "logloss": metrics.logloss,
        "PCOC": float(of.scored.score[:, 0].sum() / np.asarray(of.truth["probability"]).sum()),
        "gradient of negatives": fmean(of.negatives[STEPS]),
    }


def sparse(rate: str, users: int = 0) -> Experiment:
    """Where `rate` % of the candidates are clicked."""
    return Experiment(
        kind=f"sparse_{rate}",
        users=users,
        paper="ranking loss (arXiv 2403.14144)",
        overrides=['model.mixer.kind="mean"', "train.early_stopping.patience=4"],
        models={"bce": [], "pair + bce": ['tasks.click.rank="pair"', "tasks.click.bce_weight=0.5"]},
        measure=_measure,
        claims={
            "negatives have larger gradients": lambda v: (
                v["pair + bce"]["gradient of negatives"] > v["bce"]["gradient of negatives"]
            ),
            "logloss is lower": lambda v: v["pair + bce"]["logloss"] < v["bce"]["logloss"],
            "AUC is higher": lambda v: v["pair + bce"]["AUC"] > v["bce"]["AUC"],
            "PCOC is within 0.03 of 1": lambda v: abs(v["pair + bce"]["PCOC"] - 1) <= 0.03,
        },
    )
