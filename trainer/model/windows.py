"""What a candidate may keep: windows of behaviors, and where each behavior stands seen from the request.

Shape legend of trainer.model (besides that of `trainer.data.batch`):
    W windows    X columns of a window, newest first    H heads    G target groups    S looked-up rows
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.data.batch import RequestBatch
from trainer.model.ops.bags import rows_at
from trainer.model.ops.precision import full, in_single_precision
from trainer.model.ops.traced import is_traced, stable_sort
from trainer.model.time import Marks, age_bucket, no_mark


class Slots:
    """Candidates side by side within their window, so that a window is multiplied once with all of them.

    Args:
        of_candidate: int64 [C], ascending: each candidate's window; windows: W.
        counts: [W], candidates of each window, or one number that holds for all of them; None: they are
            counted, for which the host waits.
    """

    def __init__(self, of_candidate: Tensor, windows: int, counts: Sequence[int] | None = None) -> None:
        self.window = of_candidate
        if counts is None:
            counts = torch.bincount(of_candidate, minlength=windows).tolist()
        self.shape = (windows, max(max(counts, default=0), 1))
        # All windows have equally many candidates: they stand side by side already.
        self.full = self.window.numel() == self.shape[0] * self.shape[1]

    @cached_property
    def slot(self) -> Tensor:
        """int64 [C], each candidate's place among those of its window."""
        return places_in_groups(self.window, self.shape[0])

    def spread(self, part_C: Tensor) -> Tensor:
        """[C, ...] -> [W, most candidates of a window, ...], zero where there is none."""
        if self.full:
            return part_C.view(*self.shape, *part_C.shape[1:])
        spread = part_C.new_zeros(*self.shape, *part_C.shape[1:])
        return spread.index_put((self.window, self.slot), part_C)

    def collect(self, part_WS: Tensor) -> Tensor:
        """The inverse: [W, slots, ...] -> [C, ...]."""
        return part_WS.flatten(0, 1) if self.full else part_WS[self.window, self.slot]


def one_each(windows: int) -> tuple[int, ...]:
    """Counts of windows of one candidate each. Exported, windows have one count that all of them share."""
    return (1,) if is_traced() else (1,) * windows


def places_in_groups(group: Tensor, groups: int) -> Tensor:
    """int64 [n], ascending -> each one's place among those of its group, from 0; without any wait."""
    # Not bincount, which asks a device for the largest.
    counts = torch.zeros(groups, dtype=torch.int64, device=group.device)
    counts = counts.scatter_add_(0, group, torch.ones_like(group))
    first = torch.cumsum(counts, 0) - counts
    return torch.arange(group.numel(), device=group.device) - first[group]


@dataclass(frozen=True)
class Windows:
    """Which behaviors are searched, padded to the longest; everything is 0 where `mask` is False.

    A window belongs to a request, or to a single candidate after a hard search in the data path.

    Attributes:
        index: int64 [W, X], behaviors of the batch; X is at least 1.
        mask: bool [W, X]; marks: [W, X].
        log_size: float32 [W, X], ln of the behaviors that a cluster stands for; None = single behaviors.
        of_candidate: int64 [C], ascending: each candidate's window.
        lengths: int64 [W] where windows are stretches of the history: column x of a window is the
            behavior x before that of column 0; else None.
        counts: [W], candidates of each window, where the host knows them.
        seconds: int64 [W, X], from a behavior to the request, where someone asks for more than `marks.age`.
    """

    index: Tensor
    mask: Tensor
    marks: Marks
    log_size: Tensor | None
    of_candidate: Tensor
    lengths: Tensor | None = None
    counts: tuple[int, ...] | None = None
    seconds: Tensor | None = None

    @cached_property
    def host_counts(self) -> tuple[int, ...]:
        """[W], candidates of each window; where they are not known the host waits for them."""
        if self.counts is not None:
            return self.counts
        return tuple(torch.bincount(self.of_candidate, minlength=self.index.shape[0]).tolist())

    @property
    def spans(self) -> list[tuple[int, int]]:
        """[W], the candidates [first, last) of each window; where they are not known the host waits."""
        return list(pairwise(accumulate(self.host_counts, initial=0)))

    @cached_property
    def slots(self) -> Slots:
        """Its candidates side by side."""
        return Slots(self.of_candidate, self.index.shape[0], self.host_counts)

    @cached_property
    def _whole(self) -> Selection:
        return self.columns(None, None)

    def of_candidates(self) -> Selection:
        """Every candidate keeps its whole window: [C, X]; put together once."""
        return self._whole

    def columns(self, column_CK: Tensor | None, mask_CK: Tensor | None) -> Selection:
        """Follow columns of the candidates' windows to behaviors; None = all columns, in order."""
        window, width = self.of_candidate, self.index.shape[1]
        place_CK = None if column_CK is None else window[:, None] * width + column_CK

        def follow(part: Tensor) -> Tensor:
            return part[window] if place_CK is None else part.take(place_CK)

        mask = follow(self.mask) if mask_CK is None else mask_CK

        def masked(part: Tensor) -> Tensor:
            if not any(part.stride()):
                # One zero for all places.
                return part[:1, :1].expand(mask.shape)
            return torch.where(mask, follow(part), 0)

        size = None if self.log_size is None else masked(self.log_size)
        return Selection(masked(self.index), mask, self.marks.each(masked), size)


@dataclass(frozen=True)
class Selection:
    """What stage one keeps; everything is 0 where `mask` is False.

    Attributes:
        index: int64 [C, K] ([W, K] where a sequence model works on windows), behaviors of the batch.
        mask: bool, False where a window holds fewer than K behaviors.
        marks, log_size: as in `Windows`.
    """

    index: Tensor
    mask: Tensor
    marks: Marks
    log_size: Tensor | None = None


def pooled_windows(value_SD: Tensor, place_WX: Tensor, windows: Windows, weight_CX: Tensor) -> Tensor:
    """sum_x weight[c, x] * value[place[window of c, x]] -> [C, D], one batched product for all windows.

    In single precision, as `weighted_bags` adds up kept behaviors.
    """
    with in_single_precision(weight_CX.device):
        value_WXD = rows_at(full(value_SD), place_WX)
        return windows.slots.collect(windows.slots.spread(full(weight_CX)) @ value_WXD)


def windows_of(
    batch: RequestBatch,
    history_length: int,
    newest: int = 0,
    clusters: bool = False,
    ages: bool = True,
    seconds: bool = False,
) -> Windows:
    """What the batch's candidates may keep: their request's window, or what a hard search retrieved.

    Args:
        batch: R requests with C candidates.
        history_length: L; ranks beyond it share the last place of the position tables.
        newest: only the newest so many behaviors of each request, whatever a hard search retrieved; 0 = all.
        clusters: the clusters of the request's history instead, each at the behavior that stands for it.
        ages: whether anyone reads the marks' ages; else they are one zero for all places.
        seconds: whether anyone reads the ages in seconds; only where windows are stretches of the history.
    """
    if clusters:
        return _cluster_windows(batch, history_length)
    if newest or batch.retrieval is None:
        return _request_windows(batch, newest, ages, seconds)
    return _retrieved_windows(batch, history_length, ages)


def _cluster_windows(batch: RequestBatch, history_length: int) -> Windows:
    """Clusters whose chunk was complete before the request, newest first, with ln of their sizes."""
    clusters = batch.clusters
    assert clusters is not None
    whole = _request_windows(batch, ages=False)
    index = whole.index
    if not batch.behaviors:
        return replace(whole, lengths=None, log_size=torch.zeros(index.shape, device=index.device))
    mask = whole.mask & (clusters.size[index] > 0) & (clusters.until[index] <= clusters.end[:, None])
    count = max(batch.host_sizes.clusters, 1)
    column = stable_sort((~mask).to(torch.int32)).indices[:, :count]
    mask, index = mask.gather(1, column), index.gather(1, column)
    index = torch.where(mask, index, 0)
    rank = torch.where(mask, mask.cumsum(1, dtype=torch.int32).clamp(max=history_length), 0)
    age = torch.where(mask, age_bucket(batch.request_time[:, None] - clusters.time[index]), 0)
    size = torch.where(mask, clusters.size[index].to(torch.float32).log(), 0.0)
    marks = Marks(rank, age, no_mark(rank))
    return replace(whole, index=index, mask=mask, marks=marks, log_size=size, lengths=None)


def _retrieved_windows(batch: RequestBatch, history_length: int, ages: bool) -> Windows:
    """One window a candidate, deepest match first."""
    retrieval = batch.retrieval
    assert retrieval is not None
    # A window has a column, also where nothing was retrieved.
    index, rank, level = (
        part if part.shape[1] else F.pad(part, (0, 1))
        for part in (retrieval.index, retrieval.rank, retrieval.level)
    )
    mask = F.pad(retrieval.index >= 0, (0, index.shape[1] - retrieval.index.shape[1]))
    index = torch.where(mask, index, 0)
    marks = Marks(
        torch.where(mask, rank.clamp(max=history_length).to(torch.int32), 0),
        _ages(batch, batch.request_time[batch.candidate_request], index, mask) if ages else no_mark(index),
        torch.where(mask, level.to(torch.int32), 0),
    )
    each = torch.arange(batch.candidates, device=index.device)
    return Windows(index, mask, marks, None, each, counts=one_each(batch.candidates))


def _request_windows(
    batch: RequestBatch, newest: int = 0, ages: bool = True, seconds: bool = False
) -> Windows:
    """The requests' windows side by side (X = longest window of the batch)."""
    length = batch.window_end - batch.window_start
    if newest:
        length = length.clamp(max=newest)
    longest = max(batch.host_sizes.longest(newest), 1)
    step = torch.arange(longest, device=length.device)
    rank = torch.arange(1, longest + 1, dtype=torch.int32, device=length.device)
    index = batch.window_end[:, None] - 1 - step[None, :]
    if not is_traced() and batch.host_sizes.all_as_long(longest):
        # Nothing is padded: a single request's window, above all.
        mask = torch.ones(index.shape, dtype=torch.bool, device=index.device)
        rank = rank.expand(index.shape)
    else:
        mask = step[None, :] < length[:, None]
        index, rank = torch.where(mask, index, 0), torch.where(mask, rank, 0)
    nothing = no_mark(index)
    age = _ages(batch, batch.request_time, index, mask) if ages else nothing
    marks = Marks(rank, age, nothing)
    counts = batch.host_sizes.candidates
    exact = _seconds(batch, batch.request_time, index, mask) if seconds else None
    return Windows(index, mask, marks, None, batch.candidate_request, length, counts, exact)


def _ages(batch: RequestBatch, time_W: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """`time_W`: of the request of each window."""
    return torch.where(mask, age_bucket(_seconds(batch, time_W, index, mask)), 0)


def _seconds(batch: RequestBatch, time_W: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """int64, from each behavior to the request of its window."""
    if not batch.behaviors:
        return torch.zeros_like(index)
    return torch.where(mask, time_W[:, None] - batch.behavior_time[index], 0)


def first_ids(batch: RequestBatch, feature: str) -> tuple[Tensor, Tensor]:
    """The id of each behavior [N] and candidate [C] in a feature that has one; 0 where it has none."""
    of_behaviors, of_candidates = all_ids(batch, feature)
    return of_behaviors[: batch.behaviors, 0], of_candidates[:, 0]


def all_ids(batch: RequestBatch, feature: str) -> tuple[Tensor, Tensor]:
    """The ids of each behavior [N, most of a bag] and candidate [C, most], 0 after the last; N at least 1."""
    bags = batch.features[feature]
    lengths, offsets = bags.lengths().to(torch.int64), bags.offsets().to(torch.int64)
    most = max(batch.host_sizes.bags[batch.features.keys().index(feature)], 1)
    step = torch.arange(most, device=lengths.device)
    inside = step < lengths[:, None]
    values = F.pad(bags.values().to(torch.int64), (0, 1))
    ids = torch.where(inside, values[torch.where(inside, offsets[:-1, None] + step, 0)], 0)
    of_behaviors = ids[: batch.behaviors]
    return of_behaviors if batch.behaviors else F.pad(of_behaviors, (0, 0, 0, 1)), ids[batch.behaviors :]
