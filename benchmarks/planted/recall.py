"""How much of the planted signal lies in the behaviors that a search keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipelines.synth.kinds import Kind
from pipelines.synth.log import Behaviors
from trainer.data.batch import RequestBatch
from trainer.data.reader import SequenceLogReader

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
ENOUGH = 3  # relevant behaviors that a candidate must have for its share of the signal to count


@dataclass(frozen=True)
class Recall:
    """Means over candidates.

    Attributes:
        share: |worth| of kept behaviors over that of all visible ones, of candidates with 3 or more relevant
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


def planted_recall(
    model: nn.Module, reader: SequenceLogReader, whole: SequenceLogReader, kind: Kind, seed: int
) -> Recall:
    """Run the search of `model` over a whole split of a planted log made with `kind` and `seed`.

    `whole` reads the same split without a hard search in the data path: a batch with one lacks what the
    search left out. How steps are cut does not depend on the search, so the two go side by side.
    """
    weights, kept = [], []
    with closing(reader.steps()) as steps, closing(whole.steps()) as whole_steps:
        for step, whole_step in zip(steps, whole_steps, strict=True):
            batch, complete = step.batch, whole_step.batch
            if not torch.equal(_requests(batch), _requests(complete)):
                raise SystemExit("the two readers cut different steps; give them the same data settings")
            index, mask = kept_behaviors(model, batch)
            weights.append(np.abs(worth(complete, kind, seed)))
            kept.append(kept_places(batch, _array(index), _array(mask), weights[-1].shape))
    return measure(list(zip(weights, kept, strict=True)))


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
    """`parts` are pairs of |worth| [C, L'] (newest first, 0 where there is none) and what is kept [C, L']."""
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


def worth(batch: RequestBatch, kind: Kind, seed: int) -> Floats:
    """The worth of each visible behavior to each candidate, [C, L'], newest first; 0 beyond the window."""
    request, n = batch.candidate_request, batch.behaviors
    start, end = batch.window_start[request], batch.window_end[request]
    step = torch.arange(int((end - start).max()))
    visible = step[None] < (end - start)[:, None]
    index = torch.where(visible, end[:, None] - 1 - step[None], 0)
    ids = {name: batch.features[name].values() for name in batch.features.keys()}  # noqa: SIM118 - no dict
    age = batch.request_time[request][:, None] - batch.behavior_time[index]
    seen = Behaviors(
        {name: _array(each[:n][index]) for name, each in ids.items()}, _array(1 + step), _array(age)
    )
    target = {name: _array(each[n:, None]) for name, each in ids.items()}
    return np.where(_array(visible), kind.worth(seed, target, seen), 0.0)


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


def _requests(batch: RequestBatch) -> torch.Tensor:
    return batch.request_id[batch.candidate_request]


def _array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return array
