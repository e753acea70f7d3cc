"""The order in which a search ranks behaviors, and how good it is against the ground truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import rankdata

from trainer.analysis.search.information import Floats, Ints, window_ids
from trainer.data.batch import RequestBatch
from trainer.model.frame import TwoStageModel
from trainer.model.windows import first_ids

Bools = npt.NDArray[np.bool_]
REFERENCES = ("newest first", "same category, newest first", "random")


@dataclass(frozen=True)
class Ranking:
    """The behaviors of a batch as a search ranks them; windows are newest first.

    Attributes:
        target: [C], category; window: [C, X], categories, -1 = nothing.
        score: [C, X], -inf where there is nothing; order: [C, K], columns that a search keeps, best first.
    """

    target: Ints
    window: Ints
    score: Floats
    order: Ints

    def part(self, chosen: Bools) -> Ranking:
        """Some of the candidates."""
        return Ranking(self.target[chosen], self.window[chosen], self.score[chosen], self.order[chosen])


@dataclass(frozen=True)
class Quality:
    """Of each candidate: NDCG@K, how many of the K best it keeps, Spearman's rank correlation of score and
    gain over the window. NaN where no behavior tells anything, or all tell the same."""

    ndcg: Floats
    hits: Floats
    correlation: Floats


def obstacle(model: TwoStageModel) -> str:
    """Why the search of a model gives no one order of its windows; empty if it does."""
    branches = model.branches.named()
    if len(branches) > 1:
        return "has several branches, each of which keeps behaviors of its own"
    (branch,) = branches.values()
    if branch.scorer is None or branch.search is None:
        return "reads whole windows and searches nothing"
    if branch.scorer.heads > 1:
        return "searches with several heads, each of which has an order of its own"
    if branch.settings.clusters:
        return "searches clusters of behaviors"
    return ""


def rank(
    model: TwoStageModel, batch: RequestBatch, feature: str, known: RequestBatch | None = None
) -> Ranking:
    """The ranking of the main branch, for candidates whose window holds more than K behaviors.

    Args:
        model: one without an `obstacle`; batch: that was not searched while it was read.
        known: the same with the ids that the model knows; None: it knows those of the batch.
    """
    (main,) = model.retrieve(batch if known is None else known).values()
    (branch,) = model.branches.named().values()
    assert branch.scorer is not None
    k, kept = branch.settings.k, main.selection
    with torch.no_grad():
        score = branch.scorer.over_windows(main.vectors, main.windows)[:, 0].cpu().numpy().astype(np.float64)
    mask = kept.mask.cpu().numpy()
    column = np.where(mask, kept.marks.position.cpu().numpy() - 1, 0)
    best = np.where(mask, np.take_along_axis(score, column, axis=1), -np.inf)
    order = np.take_along_axis(column, np.argsort(-best, axis=1, kind="stable")[:, :k], axis=1)
    ids_N, ids_C = first_ids(batch, feature)
    window = window_ids(batch, ids_N, model.branches.history_length)[batch.candidate_request.numpy()]
    wide = (window >= 0).sum(axis=1) > k
    return Ranking(ids_C.numpy(), window, score, order).part(wide)


def references(ranking: Ranking, rng: np.random.Generator) -> dict[str, Ranking]:
    """Rankings of the same windows that learn nothing, by the names in `REFERENCES`."""
    real = ranking.window >= 0
    place = np.broadcast_to(np.arange(real.shape[1]), real.shape)
    same = (ranking.window == ranking.target[:, None]) & (ranking.target > 0)[:, None]
    scores = (-place, np.where(same, real.shape[1], 0) - place, rng.random(real.shape))
    return {
        name: _by_score(ranking, np.where(real, score, -np.inf))
        for name, score in zip(REFERENCES, scores, strict=True)
    }


def _by_score(ranking: Ranking, score: Floats) -> Ranking:
    order = np.argsort(-score, axis=1, kind="stable")[:, : ranking.order.shape[1]]
    return Ranking(ranking.target, ranking.window, score, order)


def quality(ranking: Ranking, gain: Floats) -> Quality:
    """The quality of a ranking, given the gain [C, X] of each behavior. Empty columns do not count."""
    k = ranking.order.shape[1]
    discount = 1 / np.log2(np.arange(k) + 2)
    ideal = best_columns(ranking, gain)
    dcg, best = (
        (np.take_along_axis(gain, order, axis=1) * discount).sum(axis=1) for order in (ranking.order, ideal)
    )
    kept, wanted = (_marked(order, gain.shape) for order in (ranking.order, ideal))
    with np.errstate(invalid="ignore"):
        ndcg = dcg / best  # NaN where no behavior tells anything
    hits = (kept & wanted).sum(axis=1).astype(float)
    return Quality(ndcg, hits, _spearman(ranking.score, gain, ranking.window >= 0))


def best_columns(ranking: Ranking, gain: Floats) -> Ints:
    """The K columns of each window with the largest gains, the newest of equal ones: [C, K]."""
    real = ranking.window >= 0
    order = np.argsort(-np.where(real, gain, -np.inf), axis=1, kind="stable")
    return np.asarray(order[:, : ranking.order.shape[1]])


def wanted_by_place(ranking: Ranking, gain: Floats, bins: Ints) -> Ints:
    """How many of the K most informative behaviors lie in each bin of places, and how many of them are kept.

    Behaviors that tell nothing are not wanted.

    Args:
        bins: [L], see `trainer.analysis.search.information.places`.

    Returns:
        int64 [2, bins].
    """
    wanted = _marked(best_columns(ranking, gain), gain.shape) & (gain > 0) & (ranking.window >= 0)
    kept = wanted & _marked(ranking.order, gain.shape)
    count = int(bins[-1]) + 1
    columns = bins[: gain.shape[1]]
    return np.stack(
        [
            np.bincount(columns, weights=part.sum(axis=0), minlength=count).astype(np.int64)
            for part in (wanted, kept)
        ]
    )


def _marked(order: Ints, shape: tuple[int, ...]) -> Bools:
    marked = np.zeros(shape, dtype=bool)
    np.put_along_axis(marked, order, True, axis=1)
    return marked


def _spearman(score: Floats, gain: Floats, real: Bools) -> Floats:
    """Spearman's correlation of each row, over its real columns.

    Equal values share their mean rank. The result is NaN where all values are equal.
    """
    deviations = []
    for values in (score, gain):
        # Columns without a behavior tie below all others, which shifts the others' ranks alike.
        rank = np.where(real, rankdata(np.where(real, values, -np.inf), axis=1), 0.0)
        mean = rank.sum(axis=1, keepdims=True) / real.sum(axis=1, keepdims=True)
        deviations.append(np.where(real, rank - mean, 0.0))
    a, b = deviations
    with np.errstate(invalid="ignore"):
        return np.asarray((a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1)))
