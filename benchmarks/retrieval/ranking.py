"""The order in which a search ranks behaviors, and how good it is against the ground truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import rankdata

from benchmarks.retrieval.information import Floats, Ints, window_ids
from trainer.data.batch import RequestBatch
from trainer.model.frame import TwoStageModel
from trainer.model.windows import first_ids

Bools = npt.NDArray[np.bool_]


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


@dataclass(frozen=True)
class Quality:
    """Of each candidate: NDCG@K, how many of the K best it keeps, Spearman's rank correlation of score and
    gain over the window."""

    ndcg: Floats
    hits: Floats
    correlation: Floats


def rank(model: TwoStageModel, batch: RequestBatch, feature: str) -> Ranking:
    """The ranking of the main branch, for candidates whose window holds more than K behaviors.

    Raises:
        SystemExit: the model has several heads or branches, or searches no plain windows.
    """
    searched = model.retrieve(batch)
    branch = model.branches["main"]
    if len(searched) > 1 or branch.scorer is None or branch.scorer.heads > 1 or branch.settings.clusters:
        raise SystemExit("retrieval is measured of models with one branch and one head")
    if batch.retrieval is not None:
        raise SystemExit("retrieval is measured of models that search the whole window, not data.search")
    main, k = searched["main"], branch.settings.k
    with torch.no_grad():
        score = branch.scorer.over_windows(main.vectors, main.windows)[:, 0].numpy().astype(np.float64)
    kept = main.selection
    column = np.where(kept.mask.numpy(), kept.marks.position.numpy() - 1, 0)
    best = np.where(kept.mask.numpy(), np.take_along_axis(score, column, axis=1), -np.inf)
    order = np.take_along_axis(column, np.argsort(-best, axis=1, kind="stable")[:, :k], axis=1)
    ids_N, ids_C = first_ids(batch, feature)
    window = window_ids(batch, ids_N, model.branches.history_length)[batch.candidate_request.numpy()]
    wide = (window >= 0).sum(axis=1) > k
    return Ranking(ids_C.numpy()[wide], window[wide], score[wide], order[wide])


def references(ranking: Ranking, rng: np.random.Generator) -> dict[str, Ranking]:
    """Rankings of the same windows that learn nothing."""
    real = ranking.window >= 0
    place = np.broadcast_to(np.arange(real.shape[1]), real.shape)
    same = (ranking.window == ranking.target[:, None]) & (ranking.target > 0)[:, None]
    scores = {
        "newest first": -place,
        "same category, newest first": np.where(same, real.shape[1], 0) - place,
        "random": rng.random(real.shape),
    }
    return {name: _by_score(ranking, np.where(real, score, -np.inf)) for name, score in scores.items()}


def _by_score(ranking: Ranking, score: Floats) -> Ranking:
    order = np.argsort(-score, axis=1, kind="stable")[:, : ranking.order.shape[1]]
    return Ranking(ranking.target, ranking.window, score, order)


def quality(ranking: Ranking, gain: Floats) -> Quality:
    """The quality of a ranking, given the gain [C, X] of each behavior. Empty columns do not count."""
    real, k = ranking.window >= 0, ranking.order.shape[1]
    discount = 1 / np.log2(np.arange(k) + 2)
    ideal = np.argsort(-np.where(real, gain, -np.inf), axis=1, kind="stable")[:, :k]
    dcg, best = (
        (np.take_along_axis(gain, order, axis=1) * discount).sum(axis=1) for order in (ranking.order, ideal)
    )
    kept, wanted = (_marked(order, gain.shape) for order in (ranking.order, ideal))
    with np.errstate(invalid="ignore"):
        ndcg = dcg / best  # NaN where no behavior tells anything
    return Quality(ndcg, (kept & wanted).sum(axis=1).astype(float), _spearman(ranking.score, gain, real))


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
