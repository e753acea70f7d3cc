"""ESMM against a conversion task that learns from clicks alone; both are judged on all impressions."""

from __future__ import annotations

import numpy as np

from benchmarks.planted.experiments.experiment import Experiment, Measured, Values
from trainer.quality.metrics import logloss
from trainer.quality.ranking import auc


def _measure(of: Measured) -> Values:
    """Of p(conversion | click) on all impressions: the expected logloss, and the AUC of whole candidates."""
    place = of.scored.tasks.index("conversion")
    p, truth = of.scored.score[:, place], np.asarray(of.truth["probability_conversion"], dtype=np.float64)
    drawn = (np.random.default_rng(0).random(truth.size) < truth).astype(np.float64)
    clicked = ~np.isnan(of.scored.label[:, place])
    return {
        "all impressions": logloss(p, truth),
        "all impressions, AUC": auc(p, drawn),
        "clicks only": logloss(p[clicked], truth[clicked]),
        "PCOC on all": float(p.sum() / truth.sum()),
    }


EXPERIMENT = Experiment(
    kind="funnel",
    paper="ESMM (SIGIR'18)",
    overrides=['model.mixer.kind="mean"', "model.experts.own=1"],
    models={
        "conversion alone": ["tasks.conversion={}", "model.experts.own=0"],
        "click and conversion": ["tasks.click={}", "tasks.conversion={}"],
        "esmm": [
            "tasks.click={}",
            'tasks.conversion.loss="none"',
            'tasks.ctcvr.product=["click", "conversion"]',
        ],
    },
    measure=_measure,
    claims={
        "ESMM is below the conversion task alone": lambda v: (
            v["esmm"]["all impressions"] < v["conversion alone"]["all impressions"]
        ),
        "ESMM is below click and conversion with shared tables": lambda v: (
            v["esmm"]["all impressions"] < v["click and conversion"]["all impressions"]
        ),
    },
)
