"""Calibration curves: in bins of predictions, how often labels were positive."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.analysis.slices import TaskCandidates
from trainer.quality.bootstrap import Interval, UserDraws
from trainer.quality.metrics import score_bins
from trainer.quality.ranking import Ints


@dataclass(frozen=True)
class CalibrationBin:
    """Candidates whose predictions lie near each other.

    Attributes:
        prediction: their mean; rate: the mean of their labels with its interval; candidates: how many.
    """

    prediction: float
    rate: Interval
    candidates: int


def calibration_curve(part: TaskCandidates, draws: UserDraws, bins: int = 10) -> list[CalibrationBin]:
    """Equally full bins by ascending prediction; equal predictions share one, so that some may be missing.

    The bins are those of all candidates in every replicate.
    """
    if not part.score.size:
        return []
    place = score_bins(part.score, bins)
    own, at = np.unique(part.user, return_inverse=True)
    # [2, bins, own users]: candidates and labels.
    sums = np.stack(
        [
            np.bincount(place * own.size + at, weight, bins * own.size).reshape(bins, own.size)
            for weight in (np.ones(place.size), part.label)
        ]
    )
    blocks = [sums @ times_UB[own] for times_UB in draws.blocks(bins * own.size)]
    count_BR, label_BR = np.concatenate(blocks, axis=2)
    drawn = np.divide(label_BR, count_BR, out=np.full(count_BR.shape, np.nan), where=count_BR > 0)
    found = []
    for number in np.unique(place).tolist():
        inside: Ints = np.nonzero(place == number)[0]
        rate = float(part.label[inside].mean())
        users = int((sums[0, number] > 0).sum())
        interval = Interval.of(rate, drawn[number], users)
        found.append(CalibrationBin(float(part.score[inside].mean()), interval, inside.size))
    return found
