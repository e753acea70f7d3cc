"""The ground truth of a search: how much a behavior tells about the response to a target.

For target category t, behavior category c and place p (1 = newest), over the candidates of category t whose
window has a place p: the mutual information, in bits, of "the behavior at p is of category c" and the label
(TIN, section 2; DARE, section 4.4). A count of 0 is 0 log 0 = 0. Candidates whose label was not observed, and
those without a place p, are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from trainer.data.batch import RequestBatch
from trainer.data.reader import SequenceLogReader
from trainer.model.windows import first_ids, windows_of

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
# Windows that are counted at a time, for the memory of it.
_AT_ONCE = 8192


@dataclass(frozen=True)
class Impressions:
    """The requests of a split, and the categories that were shown in each.

    Attributes:
        window: int16 [R, L], categories of the visible behaviors, newest first; -1 where there is none.
        request, category, shown, clicked: int64 [S], one entry for each request and category shown in it: how
            many candidates of it there were, and how many of them were clicked.
    """

    window: npt.NDArray[np.int16]
    request: Ints
    category: Ints
    shown: Ints
    clicked: Ints


def read_impressions(reader: SequenceLogReader, feature: str, length: int, rows: int) -> Impressions:
    """Read a split; the label is that of the first task.

    Args:
        feature: of both sides, one id each; length: L; rows: of `feature`, 32,768 at most.
    """
    windows, pairs = [np.zeros((0, length), dtype=np.int16)], [np.zeros((4, 0), dtype=np.int64)]
    requests = 0
    with closing(reader.steps()) as steps:
        for step in steps:
            window, pair = _of_batch(step.batch, feature, length, rows)
            pair[0] += requests
            requests += window.shape[0]
            windows.append(window)
            pairs.append(pair)
    return Impressions(np.concatenate(windows), *np.concatenate(pairs, axis=1))


def _of_batch(
    batch: RequestBatch, feature: str, length: int, rows: int
) -> tuple[npt.NDArray[np.int16], Ints]:
    """Windows [R, L], and requests, categories, shown and clicked [4, S]."""
    ids_N, ids_C = first_ids(batch, feature)
    label = batch.labels[:, 0].numpy()
    known = ~np.isnan(label)
    window = np.full((batch.requests, length), -1, dtype=np.int16)
    found = window_ids(batch, ids_N, length)
    window[:, : found.shape[1]] = found
    key = (batch.candidate_request.numpy() * rows + ids_C.numpy())[known]
    pair, place = np.unique(key, return_inverse=True)
    clicked = np.bincount(place, weights=label[known] > 0, minlength=pair.size)
    shown = np.bincount(place, minlength=pair.size)
    return window, np.stack([pair // rows, pair % rows, shown, clicked.astype(np.int64)])


def window_ids(batch: RequestBatch, ids_N: torch.Tensor, length: int) -> Ints:
    """Ids of the visible behaviors [R, X], newest first; -1 where there is none."""
    windows = windows_of(batch, length)
    if not batch.behaviors:
        return np.full(windows.index.shape, -1)
    return np.asarray(torch.where(windows.mask, ids_N[windows.index], -1).numpy())


def places(length: int, pooled: bool) -> Ints:
    """The bin of each place [L]: its own, or one for 1, one for 2 and 3, one for 4 to 7 and so on."""
    every = np.arange(length)
    return np.asarray(np.floor(np.log2(1 + every)).astype(np.int64) if pooled else every)


@dataclass(frozen=True)
class Truth:
    """Attributes: gain: float32 [T, C, bins], bits; bins: [L]; shown: [T], candidates counted."""

    gain: npt.NDArray[np.float32]
    bins: Ints
    shown: Ints

    def of(self, target: Ints, window: Ints) -> Floats:
        """Gains [C, X] of windows [C, X] (newest first, -1 = nothing) for targets [C]."""
        bins = self.bins[: window.shape[1]]
        gain = self.gain[target[:, None], window.clip(min=0), bins[None, :]]
        return np.where(window >= 0, gain, 0.0).astype(np.float64)


def count_truths(
    split: Impressions, rows: int, kinds: Sequence[str] = ("exact", "pooled")
) -> dict[str, Truth]:
    """Count all 2 x 2 tables of a split, of `exact` places, and of places `pooled` to powers of two.

    Each place of a bin is an observation of its own. A table of exact places has rows x rows x L cells, most
    of which hold few observations, so that much of their information is chance.
    """
    length = split.window.shape[1]
    bins = {name: places(length, name == "pooled") for name in kinds}
    gains = {n: np.zeros((rows, rows, int(each[-1]) + 1), dtype=np.float32) for n, each in bins.items()}
    total = np.zeros(rows, dtype=np.int64)
    for target, chosen in _by_target(split, rows):
        total[target] = split.shown[chosen].sum()
        counts = [_present(split, chosen, weight[chosen], rows) for weight in (split.shown, split.clicked)]
        for name, each in bins.items():
            starts = np.searchsorted(each, np.arange(int(each[-1]) + 1))
            seen = [np.add.reduceat(count, starts, axis=1) for count in counts]
            gains[name][target] = table_information(seen[1], seen[0] - seen[1], *_totals(seen))
    return {name: Truth(gain, bins[name], total) for name, gain in gains.items()}


def _by_target(split: Impressions, rows: int) -> Iterator[tuple[int, Ints]]:
    order = np.argsort(split.category, kind="stable")
    bounds = np.searchsorted(split.category[order], np.arange(rows + 1))
    for target in range(rows):
        if bounds[target] < bounds[target + 1]:
            yield target, order[bounds[target] : bounds[target + 1]]


def _present(split: Impressions, chosen: Ints, weight: Ints, rows: int) -> Floats:
    """How often each category is at each place of the chosen windows, counted `weight` times: [rows, L]."""
    chosen, weight = chosen[weight > 0], weight[weight > 0]
    length = split.window.shape[1]
    found = np.zeros(rows * length + 1)
    for first in range(0, len(chosen), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        window = split.window[split.request[chosen[part]]].astype(np.int64)
        place = np.where(window >= 0, window * length + np.arange(length), rows * length)
        weights = np.broadcast_to(weight[part, None], place.shape).reshape(-1)
        found += np.bincount(place.reshape(-1), weights=weights, minlength=rows * length + 1)
    return found[:-1].reshape(rows, length)


def _totals(seen: list[Floats]) -> tuple[Floats, Floats]:
    """Observations of each bin with and without a click: every behavior has exactly one category."""
    shown, clicked = (each.sum(axis=0, keepdims=True) for each in seen)
    return clicked, shown - clicked


def table_information(
    clicked: Floats, missed: Floats, clicked_total: Floats, missed_total: Floats
) -> npt.NDArray[np.float32]:
    """Mutual information in bits of the table [[clicked, missed], [the rest of both totals]]; 0 log 0 = 0."""
    total = np.maximum(clicked_total + missed_total, 1.0)
    present = clicked + missed
    information = np.zeros(np.broadcast_shapes(clicked.shape, clicked_total.shape))
    for row, row_total in ((clicked, clicked_total), (missed, missed_total)):
        for cell, margin in ((row, present), (row_total - row, clicked_total + missed_total - present)):
            expected = margin * row_total / total
            ratio = np.divide(cell, expected, out=np.ones_like(information), where=(cell > 0))
            information += cell / total * np.log2(ratio)
    return np.maximum(information, 0.0).astype(np.float32)
