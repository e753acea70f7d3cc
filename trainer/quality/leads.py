"""By how much a model's metrics differ from a baseline's on the same candidates, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from trainer.quality.metrics import candidate_losses
from trainer.quality.ranking import Floats, Ints, Ranked, auc_influence, half_width

Estimate = tuple[float, Floats]
"""A metric, and what each user adds to its error, [users]."""


def estimates(
    scores: npt.ArrayLike, labels: npt.ArrayLike, groups: Ints, users: Ints, probable: bool
) -> dict[str, Estimate]:
    """AUC, GAUC and, of probabilities, logloss, by the names of `trainer.quality.metrics.Metrics`.

    Args:
        scores, labels, groups: [n], as for `measure`; users: [n], numbered from 0; probable: whether scores
            are probabilities.
    """
    auc, of_auc = auc_influence(scores, labels)
    ranked = Ranked.of(scores, labels, groups)
    count = int(users.max(initial=-1)) + 1
    found = {
        "auc": (auc, _sums(users, of_auc, count)),
        "gauc": (ranked.gauc(), _sums(ranked.of_groups(users), ranked.gauc_influence(), count)),
    }
    if probable:
        losses = candidate_losses(scores, labels)
        mean = float(losses.mean()) if losses.size else math.nan
        found["logloss"] = mean, _sums(users, (losses - mean) / max(losses.size, 1), count)
    return found


def _sums(users: Ints, values: Floats, count: int) -> Floats:
    return np.bincount(users, values, count).astype(np.float64)


def leads(model: Mapping[str, Estimate], baseline: Mapping[str, Estimate]) -> dict[str, float]:
    """`METRIC_lead`, the model's value less the baseline's, and `METRIC_lead_ci`, half of its 95 % interval.

    Both scored the same candidates, so that the interval is that of the paired difference.
    """
    values = {}
    for name, (value, of_users) in baseline.items():
        own, of_own = model[name]
        half = half_width(of_own - of_users, np.arange(of_users.size))
        values[f"{name}_lead"] = own - value
        values[f"{name}_lead_ci"] = math.nan if math.isnan(own - value) else half
    return values
