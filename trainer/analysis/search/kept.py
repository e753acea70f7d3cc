"""How much of what matters to a candidate lies in the behaviors that a search keeps.

What matters is a weight for each visible behavior: a planted worth, or the information that it has of the
response. This works for any model, however many branches and heads keep behaviors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from trainer.data.batch import RequestBatch

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
ENOUGH = 3  # relevant behaviors that a candidate must have for its share of the signal to count


@dataclass(frozen=True)
class Recall:
    """Means over candidates.

    Attributes:
        share: weight of kept behaviors over that of all visible ones, of candidates with 3 or more relevant
            ones; share_newest: the same had the search kept the newest K; share_random: K of them at random.
        recall: relevant behaviors kept over min(relevant, K), of candidates with any.
        rows, rows_recall: candidates counted in the shares and in the recall. k: most behaviors kept.
    """

    share: float
    share_newest: float
    share_random: float
    recall: float
    rows: int
    rows_recall: int
    k: int


@torch.no_grad()
def kept_behaviors(model: nn.Module, batch: RequestBatch) -> tuple[Tensor, Tensor]:
    """-> index [C, K'] into the batch's behaviors and mask [C, K'], of all branches and heads side by side.

    Args:
        model: a `TwoStageModel`, or what wraps it for training.
    """
    inner: Any = getattr(model, "module", model)
    searched = inner.retrieve(batch).items()
    # A model of whole windows searches nothing: each candidate keeps all of its window.
    kept = [
        each.selection if inner.branches[name].settings.searches else each.windows.of_candidates()
        for name, each in searched
    ]
    count = batch.candidates
    index = torch.cat([each.index.reshape(count, -1) for each in kept], dim=1)
    return index, torch.cat([each.mask.reshape(count, -1) for each in kept], dim=1)


def measure(parts: list[tuple[Floats, Bools]]) -> Recall:
    """`parts` are pairs of weights [C, L'] (newest first, 0 where there is none) and what is kept [C, L']."""
    k = max(int(kept.sum(axis=1).max(initial=0)) for _, kept in parts)
    columns = zip(*_columns(parts, k), strict=True)
    share, newest, length, recall = (np.concatenate(column) for column in columns)
    enough, relevant = ~np.isnan(share), ~np.isnan(recall)
    return Recall(
        share=float(share[enough].mean()),
        share_newest=float(newest[enough].mean()),
        share_random=float(np.minimum(1.0, k / length[enough]).mean()),
        recall=float(recall[relevant].mean()),
        rows=int(enough.sum()),
        rows_recall=int(relevant.sum()),
        k=k,
    )


def _columns(parts: list[tuple[Floats, Bools]], k: int) -> Iterator[tuple[Floats, ...]]:
    """(share, share of the newest K, visible behaviors, recall) of each candidate; NaN where not counted."""
    for weight, kept in parts:
        relevant = (weight > 0).sum(axis=1)
        total = np.where(relevant >= ENOUGH, weight.sum(axis=1), np.nan)
        possible = np.where(relevant > 0, np.minimum(relevant, k), np.nan)
        yield (
            (weight * kept).sum(axis=1) / total,
            weight[:, :k].sum(axis=1) / total,
            np.full(relevant.shape, float(weight.shape[1])),
            ((weight > 0) & kept).sum(axis=1) / possible,
        )


def kept_places(batch: RequestBatch, index: Ints, mask: Bools, shape: tuple[int, ...]) -> Bools:
    """Whether the behavior at each place of a window is kept: bool [C, L'] = `shape`, newest first."""
    row, column = np.nonzero(mask)
    if batch.retrieval is None:
        place = _array(batch.window_end[batch.candidate_request])[row] - 1 - index[row, column]
    else:
        held, rank = _array(batch.retrieval.index)[row], _array(batch.retrieval.rank)[row]
        slot = (held == index[row, column][:, None]).argmax(axis=1)
        place = rank[np.arange(row.size), slot] - 1
    kept = np.zeros(shape, dtype=bool)
    kept[row, place] = True
    return kept


def _array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return array
