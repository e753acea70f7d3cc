"""Quality of scores: AUC, GAUC, logloss, calibration. Exact, with ties, on whole splits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embeddings.errors import DataError
from trainer.quality.ranking import Floats, Ints, as_arrays, half_width, ranking_metrics


@dataclass(frozen=True)
class Metrics:
    """Metrics of one split and task; NaN where a metric has no meaning. docs/evaluation.md defines them.

    Attributes:
        auc: area under the ROC curve, ties counted half; NaN with one class only.
        gauc: mean AUC of the requests that hold both classes, weighted by their candidates.
        auc_ci, gauc_ci, logloss_ci, pcoc_ci: half of their 95 % intervals; users are independent, their
            requests are not.
        gauc_user: the same as gauc over users instead of requests.
        hr_K, ndcg_K: hit rate and NDCG of the best K of a request, over requests with both classes.
        logloss: mean binary cross entropy in nats.
        ne: logloss over the entropy of the mean label (normalised entropy); NaN with one class only.
        pcoc: sum of predictions over sum of labels; 1 is calibrated.
        ece: mean |prediction - label| over 20 equally full bins (expected calibration error).
        rate: the mean label.
        samples, positives, requests: what was counted; positives have a label of at least 0.5.
        groups, users: requests and users with both classes.
        pcoc_weighted: pcoc with each candidate's weight in the loss; None where candidates have no weights.
    """

    auc: float
    auc_ci: float
    gauc: float
    gauc_ci: float
    gauc_user: float
    hr_1: float
    hr_5: float
    hr_10: float
    ndcg_5: float
    ndcg_10: float
    logloss: float
    logloss_ci: float
    ne: float
    pcoc: float
    pcoc_ci: float
    ece: float
    rate: float
    samples: int
    positives: int
    requests: int
    groups: int
    users: int
    pcoc_weighted: float | None = None

    def as_dict(self) -> dict[str, float | int]:
        """By name; `pcoc_weighted` only where there are weights."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def measure(
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    groups: Ints,
    users: Ints | None = None,
    weights: npt.ArrayLike | None = None,
) -> Metrics:
    """Metrics of predicted probabilities.

    Args:
        scores: [n] probabilities; labels: [n] of 0 and 1, or probabilities too.
            Sample weights enter `pcoc_weighted` alone: in all else every candidate counts once.
        groups: [n] the request of each, by whatever integers; users: [n] its user. Without users every
            request counts as a user's only one.
        weights: [n], of the loss.

    Raises:
        DataError: unequal lengths, a score that is not finite or no probability, or a label outside 0 to 1.
    """
    users = groups if users is None else users
    p, y = as_arrays(scores, labels, groups, users)
    values: dict[str, Any] = {**ranking_metrics(p, y, groups, users), **calibration_metrics(p, y, users)}
    requests = int(np.unique(groups).size)
    if weights is not None:
        weight = np.asarray(weights, dtype=np.float64)
        values["pcoc_weighted"] = calibration(float((weight * p).sum()), float((weight * y).sum()))
    return Metrics(**values, samples=int(y.size), positives=int((y >= 0.5).sum()), requests=requests)


def calibration_metrics(scores: npt.ArrayLike, labels: npt.ArrayLike, users: Ints) -> dict[str, float]:
    """Everything that needs probabilities, by the names of `Metrics`; `users`: [n], as for `measure`."""
    p, y = _probabilities(scores, labels)
    rate = float(y.mean()) if y.size else math.nan
    each = candidate_losses(p, y)
    clusters = np.unique(users, return_inverse=True)[1]
    (loss, of_loss), (pcoc, of_pcoc) = ratio_influence(each, np.ones(y.size)), ratio_influence(p, y)
    return {
        "logloss": loss,
        "logloss_ci": math.nan if math.isnan(loss) else half_width(of_loss, clusters),
        "ne": normalised_loss(loss, rate),
        "pcoc": pcoc,
        "pcoc_ci": math.nan if math.isnan(pcoc) else half_width(of_pcoc, clusters),
        "ece": calibration_error(p, y),
        "rate": rate,
    }


def ratio_influence(above: Floats, below: Floats) -> tuple[float, Floats]:
    """-> (sum of `above` over that of `below`, what each candidate or user adds to its error [n]).

    The second is that of `trainer.quality.ranking.auc_influence`, by linearisation: (a - r b) / sum of b. The
    ratio is NaN where `below` adds up to nothing.
    """
    total = float(below.sum())
    if not total > 0:
        return math.nan, np.zeros(below.size)
    ratio = float(above.sum()) / total
    return ratio, (above - ratio * below) / total


def calibration(predicted: float, observed: float) -> float:
    """A sum of predictions over the sum of the labels; NaN without any positive label."""
    return predicted / observed if observed else math.nan


def normalised_loss(loss: float, rate: float) -> float:
    """A logloss over the entropy of the mean label."""
    if not 0 < rate < 1:
        return math.nan
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))
    return loss / entropy if entropy > 0 else math.nan


def logloss(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean binary cross entropy in nats; probabilities are kept 1e-7 away from 0 and 1."""
    losses = candidate_losses(scores, labels)
    return float(losses.mean()) if losses.size else math.nan


def candidate_losses(scores: npt.ArrayLike, labels: npt.ArrayLike) -> Floats:
    """The binary cross entropy of each candidate, [n], see `logloss`."""
    p, y = _probabilities(scores, labels)
    p = p.clip(1e-7, 1 - 1e-7)
    losses: Floats = -(y * np.log(p) + (1 - y) * np.log1p(-p))
    return losses


def calibration_error(scores: npt.ArrayLike, labels: npt.ArrayLike, bins: int = 20) -> float:
    """Expected calibration error over equally full bins of score, see `score_bins`."""
    p, y = _probabilities(scores, labels)
    if not y.size:
        return math.nan
    gaps = np.bincount(score_bins(p, bins), weights=p - y)
    return float(np.abs(gaps).sum()) / p.size


def score_bins(scores: Floats, bins: int) -> Ints:
    """[n], the bin of each candidate: equally full ones of ascending score; equal scores share a bin.

    The middle of the places that equal scores take decides on their bin, so that the order of the
    candidates does not matter.
    """
    order = np.argsort(scores, kind="stable")
    new = np.r_[True, np.diff(scores[order]) != 0][: scores.size]
    starts = np.nonzero(new)[0]
    ends = np.r_[starts[1:], scores.size]
    bin_of_tie = (starts + ends) * bins // (2 * scores.size)
    found = np.empty(scores.size, dtype=np.int64)
    found[order] = bin_of_tie[np.cumsum(new) - 1]
    return found


def _probabilities(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Floats, Floats]:
    p, y = as_arrays(scores, labels)
    if p.size and not (p.min() >= 0 and p.max() <= 1):
        raise DataError(f"scores lie in {p.min():g} to {p.max():g}: they must be probabilities")
    return p, y


def group_keys(*names: Ints) -> Ints:
    """One number from 0 for each different tuple of names (of user and request, say), in their order."""
    order = np.lexsort(names[::-1])
    new = np.zeros(order.size, dtype=np.bool_)
    for name in names:
        ordered = np.asarray(name)[order]
        new[1:] |= ordered[1:] != ordered[:-1]
    keys = np.empty(order.size, dtype=np.int64)
    keys[order] = np.cumsum(new)
    return keys


def first_and_all(by_task: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The values of the first task, and under `tasks` those of every task by its name.

    Files hold metrics in this form wherever they hold any.
    """
    return {**next(iter(by_task.values())), "tasks": {task: dict(values) for task, values in by_task.items()}}


def entry_of(metrics: Mapping[str, Metrics]) -> dict[str, Any]:
    """Metrics by task as files hold them."""
    return first_and_all({task: values.as_dict() for task, values in metrics.items()})


def number(value: float, digits: int = 4) -> str:
    """A dash stands for a metric that has no meaning here."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
