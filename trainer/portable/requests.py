"""Batches of the reader as the padded arrays that a portable model is given, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.data.batch import RequestBatch
from trainer.portable.padded import NO_ID
from trainer.portable.scorer import CLUSTERED, RETRIEVED, Columns

Arrays = dict[str, npt.NDArray[np.int64] | npt.NDArray[np.float32]]


def padded_requests(batch: RequestBatch, columns: Columns, names: Sequence[str]) -> Arrays:
    """The inputs of a batch, which has rows in the place of ids that come and go.

    Sizes are the largest of the batch, one at least. Behaviors beyond the window of a request are not given.
    """
    place_BL, place_BC = _places_of_behaviors(batch), _places_of_candidates(batch)
    n = batch.behaviors
    parts: dict[str, Tensor] = {
        "history_length": batch.window_end - batch.window_start,
        "history_timestamp": _at(batch.behavior_time, place_BL, 0),
        "request_timestamp": batch.request_time,
        "candidate_length": torch.bincount(batch.candidate_request, minlength=batch.requests),
    }
    for key, (history, candidate) in columns.features.items():
        bags, many = _bags(batch.features, key), key in columns.many
        sides = {history: _at(bags[:n], place_BL, NO_ID), candidate: _at(bags[n:], place_BC, NO_ID)}
        parts |= {name: part if many else part[..., 0].clamp(min=0) for name, part in sides.items() if name}
    for key, (name,) in columns.context.items():
        assert batch.context is not None
        bags, many = _bags(batch.context, key), key in columns.many
        parts[name] = bags if many else bags[:, 0].clamp(min=0)
    for number, name in enumerate(columns.numbers):
        parts[name] = _at(batch.numeric[:, number], place_BC, 0)
    if columns.domain:
        assert batch.domain is not None
        parts[columns.domain] = _at(batch.domain, place_BC, 0)
    if columns.retrieved:
        parts |= _retrieved(batch, place_BC)
    if columns.clustered:
        assert batch.clusters is not None
        clusters = batch.clusters
        for name, part in zip(CLUSTERED, (clusters.size, clusters.time, clusters.until), strict=False):
            parts[name] = _at(part, place_BL, 0)
        parts[CLUSTERED[3]] = clusters.end
    return {name: parts[name].numpy() for name in names}


def of_candidates(scores_BCT: npt.NDArray[np.float32], lengths: npt.NDArray[np.int64]) -> Tensor:
    """Scores of padded candidates -> those of the batch's candidates, [C, T]."""
    there = np.arange(scores_BCT.shape[1]) < lengths[:, None]
    return torch.from_numpy(scores_BCT[there])


def _places_of_behaviors(batch: RequestBatch) -> Tensor:
    length = batch.window_end - batch.window_start
    step = torch.arange(max(int(length.max()) if length.numel() else 0, 1))
    return torch.where(step < length[:, None], batch.window_start[:, None] + step, -1)


def _places_of_candidates(batch: RequestBatch) -> Tensor:
    counts = torch.bincount(batch.candidate_request, minlength=batch.requests)
    first = counts.cumsum(0) - counts
    step = torch.arange(max(int(counts.max()) if counts.numel() else 0, 1))
    return torch.where(step < counts[:, None], first[:, None] + step, -1)


def _at(part: Tensor, place: Tensor, padding: int) -> Tensor:
    """part[place], with `padding` where the place is negative."""
    padded = torch.cat([part, part.new_full((1, *part.shape[1:]), padding)])
    return padded[torch.where(place < 0, part.shape[0], place)]


def _bags(kjt: KeyedJaggedTensor, key: str) -> Tensor:
    """int64 [bags, most], padded with -1."""
    bag = kjt[key]
    lengths, values = bag.lengths().to(torch.int64), bag.values().to(torch.int64)
    first = lengths.cumsum(0) - lengths
    step = torch.arange(max(int(lengths.max()) if lengths.numel() else 0, 1))
    place = torch.where(step < lengths[:, None], first[:, None] + step, -1)
    return _at(values, place, NO_ID)


def _retrieved(batch: RequestBatch, place_BC: Tensor) -> Mapping[str, Tensor]:
    retrieval = batch.retrieval
    assert retrieval is not None
    start = batch.window_start[batch.candidate_request][:, None]
    own = torch.where(retrieval.index >= 0, retrieval.index - start, -1)
    parts = (own, retrieval.level.to(torch.int64), retrieval.rank.to(torch.int64))
    found = {}
    for name, part in zip(RETRIEVED, parts, strict=True):
        some = part if part.shape[1] else part.new_full((part.shape[0], 1), -1)
        found[name] = _at(some, place_BC, -1 if name == RETRIEVED[0] else 0)
    return found
