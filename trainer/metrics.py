"""Quality of scores: AUC, GAUC, logloss, calibration. Exact, with ties, on whole splits."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from embeddings.errors import DataError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Metrics:
    """Metrics of one split and task.

    Attributes:
        auc: area under the ROC curve, ties counted half; NaN with one class only.
        gauc: mean AUC of the groups that hold both classes, weighted by their candidates.
        logloss: mean binary cross entropy in nats.
        ne: logloss over the entropy of the mean label (normalised entropy).
        pcoc: sum of predictions over sum of labels; 1 is calibrated.
        ece: mean |prediction - label| over 20 equally full bins (expected calibration error).
        samples, positives, groups: what was counted; groups with both classes only.
    """

    auc: float
    gauc: float
    logloss: float
    ne: float
    pcoc: float
    ece: float
    samples: int
    positives: int
    groups: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


def measure(scores: Floats, labels: Floats, groups: Ints) -> Metrics:
    """Metrics of predicted probabilities.

    Args:
        scores: [n] probabilities in [0, 1]; labels: [n] of 0 and 1; groups: [n] grouping key of GAUC.
            Sample weights do not enter: every candidate counts once.

    Raises:
        DataError: a score is not finite.
    """
    if not np.isfinite(scores).all():
        raise DataError(
            f"{int((~np.isfinite(scores)).sum())} of {scores.size} scores are NaN or infinite; the model "
            "diverged, train again with lower learning rates"
        )
    gauc, counted = grouped_auc(scores, labels, groups)
    loss, rate = logloss(scores, labels), float(labels.mean())
    entropy = logloss(np.full_like(labels, rate), labels)
    return Metrics(
        auc=auc(scores, labels),
        gauc=gauc,
        logloss=loss,
        ne=loss / entropy if entropy > 0 else float("nan"),
        pcoc=float(scores.sum() / labels.sum()) if labels.any() else float("nan"),
        ece=calibration_error(scores, labels),
        samples=int(labels.size),
        positives=int(labels.sum()),
        groups=counted,
    )


def auc(scores: Floats, labels: Floats) -> float:
    """Area under the ROC curve by ranks; tied scores share their mean rank."""
    value, _ = grouped_auc(scores, labels, np.zeros(labels.size, dtype=np.int64))
    return value


def grouped_auc(scores: Floats, labels: Floats, groups: Ints) -> tuple[float, int]:
    """-> (mean AUC of groups with both classes, weighted by size; how many such groups)."""
    if labels.size == 0:
        return float("nan"), 0
    order = np.lexsort((scores, groups))
    scores, labels, groups = scores[order], labels[order], groups[order]
    new_group = np.r_[True, groups[1:] != groups[:-1]]
    group_start = np.nonzero(new_group)[0]
    group = np.cumsum(new_group) - 1
    new_tie = new_group | np.r_[True, scores[1:] != scores[:-1]]
    tie_start = np.nonzero(new_tie)[0]
    tie_size = np.diff(np.r_[tie_start, scores.size])
    mean_rank = (tie_start + (tie_size - 1) / 2 + 1)[np.cumsum(new_tie) - 1] - group_start[group]
    sizes = np.diff(np.r_[group_start, scores.size]).astype(np.float64)
    positives = np.add.reduceat(labels, group_start)
    rank_sum = np.add.reduceat(mean_rank * labels, group_start)
    both = (positives > 0) & (positives < sizes)
    if not both.any():
        return float("nan"), 0
    p, n = positives[both], sizes[both] - positives[both]
    values = (rank_sum[both] - p * (p + 1) / 2) / (p * n)
    return float(np.average(values, weights=sizes[both])), int(both.sum())


def logloss(scores: Floats, labels: Floats) -> float:
    """Mean binary cross entropy in nats; probabilities are kept 1e-7 away from 0 and 1."""
    p = scores.clip(1e-7, 1 - 1e-7)
    return float(-(labels * np.log(p) + (1 - labels) * np.log1p(-p)).mean())


def calibration_error(scores: Floats, labels: Floats, bins: int = 20) -> float:
    """Expected calibration error over equally full bins of score."""
    order = np.argsort(scores, kind="stable")
    gaps = [
        abs(float(scores[part].mean() - labels[part].mean())) * part.size
        for part in np.array_split(order, bins)
        if part.size
    ]
    return sum(gaps) / max(1, scores.size)


def group_keys(user_id: Ints, request_id: Ints) -> Ints:
    """One key a request, from the names of user and request."""
    _, keys = np.unique(np.stack([user_id, request_id], axis=1), axis=0, return_inverse=True)
    return keys.reshape(-1).astype(np.int64)
