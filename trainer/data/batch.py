"""RequestBatch: the jagged, contiguous unit that travels from the reader to the loss.

Shape legend used in the whole trainer:
    N behaviors of the batch    R requests    C candidates    F features    T tasks
    L history length            K kept behaviors              D embedding width

All behaviors of all blocks lie one after the other, oldest first within a block; request r sees the slice
[window_start[r], window_end[r]) of them. One KeyedJaggedTensor of stride N + C holds behaviors first, then
candidates: a bag is one behavior or one candidate, so target and behavior share a table by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass(frozen=True)
class Sizes:
    """Counts that decide the shapes of a forward pass and its losses, as integers on the host.

    A forward pass that read such a number from a tensor would wait for the device each time. So `collate`
    counts them once, from arrays in main memory, and they travel with the batch.

    Attributes:
        windows: [R], behaviors that each request may see; starts: [R], the first of them in the batch.
        candidates: [R], candidates of each request.
        bags: most ids of a bag, of each feature in the order of the batch's keys.
        one_id: every bag of every feature holds exactly one id.
        clusters: most clusters that a request may see; 0 where the batch has none.
        labelled: every candidate has a label of every task, so that none is NaN.
        observed: candidates that have a label, of each task; positives: those with a label from 0.5 on.
        pairs: of a positive and a negative of one request, of each task.
    """

    windows: tuple[int, ...]
    starts: tuple[int, ...]
    candidates: tuple[int, ...]
    bags: tuple[int, ...]
    one_id: bool
    clusters: int = 0
    labelled: bool = True
    observed: tuple[int, ...] = ()
    positives: tuple[int, ...] = ()
    pairs: tuple[int, ...] = ()

    @staticmethod
    def of(batch: RequestBatch) -> Sizes:
        """The sizes of a batch that `collate` did not make, read from its tensors: waits for the device."""
        lengths = batch.features.lengths().view(len(batch.features.keys()), -1)
        clusters, most = batch.clusters, 0
        if clusters is not None:
            parts = (batch.window_start, batch.window_end, clusters.end)
            for start, end, seen in zip(*(part.tolist() for part in parts), strict=True):
                seen_S = (clusters.size[start:end] > 0) & (clusters.until[start:end] <= seen)
                most = max(most, int(seen_S.sum()))
        candidates = torch.bincount(batch.candidate_request, minlength=batch.requests).tolist()
        return Sizes(
            tuple((batch.window_end - batch.window_start).tolist()),
            tuple(batch.window_start.tolist()),
            tuple(candidates),
            tuple(lengths.amax(1).tolist() if lengths.numel() else [0] * lengths.shape[0]),
            bool((lengths == 1).all()),
            most,
            *label_counts(batch.labels, candidates),
        )

    def longest(self, newest: int = 0) -> int:
        """Behaviors of the longest window, of which only the newest so many count; 0 = all do."""
        longest = max(self.windows, default=0)
        return min(longest, newest) if newest else longest

    def all_as_long(self, length: int) -> bool:
        """Whether all windows have at least so many behaviors."""
        return min(self.windows, default=0) >= length


class LabelCounts(NamedTuple):
    """The part of `Sizes` that labels decide."""

    labelled: bool
    observed: tuple[int, ...]
    positives: tuple[int, ...]
    pairs: tuple[int, ...]


def label_counts(labels_CT: Tensor, candidates: npt.ArrayLike) -> LabelCounts:
    """Of labels, NaN where not observed; `candidates`: [R], of each request."""
    labels, sizes = labels_CT.cpu().numpy(), np.asarray(candidates, dtype=np.int64)
    end, none = np.cumsum(sizes), np.zeros((1, labels.shape[1]), dtype=np.int64)
    # NaN is neither.
    positive, negative = (
        np.concatenate([none, chosen.cumsum(0)]) for chosen in (labels >= 0.5, labels < 0.5)
    )
    pairs = ((positive[end] - positive[end - sizes]) * (negative[end] - negative[end - sizes])).sum(0)
    observed = positive[-1] + negative[-1]
    labelled = bool((observed == labels.shape[0]).all())
    return LabelCounts(labelled, *(tuple(each.tolist()) for each in (observed, positive[-1], pairs)))


class Movable(Pipelineable):  # type: ignore[misc]
    """A dataclass whose tensors move to a device together; its other fields stay on the host."""

    def _parts(self) -> Iterator[tuple[str, Any]]:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor | Pipelineable):
                yield field.name, value

    def _each(self, change: Callable[[Any], Any]) -> Self:
        return replace(self, **{name: change(part) for name, part in self._parts()})

    def to(self, device: torch.device, non_blocking: bool = False) -> Self:
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.Stream) -> None:
        for _, part in self._parts():
            part.record_stream(stream)

    def pin_memory(self) -> Self:
        return self._each(lambda part: part.pin_memory())


@dataclass
class Clusters(Movable):
    """Clusters of a history, at the behaviors that stand for them (TWIN-V2; see `trainer.log.clusters`).

    Attributes:
        size: int64 [N], members of the cluster, 0 for behaviors that stand for none.
        time: int64 [N], mean time of the members, seconds.
        until: int64 [N], place in the user's history where the cluster's chunk ends.
        end: int64 [R], how much of the user's history a request may see: clusters with `until` <= `end`.
    """

    size: Tensor
    time: Tensor
    until: Tensor
    end: Tensor


@dataclass
class Retrieval(Movable):
    """What a hard search in the data path kept for each candidate, B behaviors at most.

    Attributes:
        index: int64 [C, B], behaviors of the batch, deepest match first, then most recent; -1 where fewer.
        level: int32 [C, B], deepest matching taxonomy level, 1 = coarsest; 0 where index is -1.
        rank: int32 [C, B], place in the whole history counted back from the request, 1 = newest.
    """

    index: Tensor
    level: Tensor
    rank: Tensor


@dataclass
class RequestBatch(Movable):
    """One rank's part of one step.

    Attributes:
        features: KJT, keys = features, stride N + C (behaviors, then candidates).
        behavior_time: int64 [N], seconds.
        request_time: int64 [R], seconds.
        window_start, window_end: int64 [R], the behaviors a request may see.
        seen: int64 [R], how many it may see, at most L, before a hard search or clusters cut the history.
        user_id, request_id: int64 [R], names of the request (grouping key of GAUC).
        candidate_request: int64 [C], ascending: which request a candidate belongs to.
        labels: float32 [C, T], of the tasks; NaN where a task was not observed.
        weight: float32 [C], a candidate's weight in the loss.
        numeric: float32 [C, X], the log's numbers and the hard search's match counts.
        context: KJT of stride R, or None where the log has no context features.
        retrieval: of a hard search, or None where a request sees its whole window.
        step_candidates: candidates of all ranks in this step, so that a mean over ranks is exact.
        clusters: of the histories, or None where the log has none or the model asks for none.
        task_weight: float32 [C, T], a candidate's weight in the loss of each task, besides `weight`; None
            where the log has none.
        domain: int64 [C], or None where data.domain names none.
        items: int64 [C], the log's ids of the candidates' items where `features` has rows in their place, for
            whoever names the candidates; None elsewhere.
        sizes: counts of the parts above, on the host; None where they are not counted yet (see `host_sizes`).
            Whoever copies a batch with other windows, candidates, labels or bags sets None.
    """

    features: KeyedJaggedTensor
    behavior_time: Tensor
    request_time: Tensor
    window_start: Tensor
    window_end: Tensor
    seen: Tensor
    user_id: Tensor
    request_id: Tensor
    candidate_request: Tensor
    labels: Tensor
    weight: Tensor
    numeric: Tensor
    context: KeyedJaggedTensor | None
    retrieval: Retrieval | None
    step_candidates: int
    clusters: Clusters | None = None
    task_weight: Tensor | None = None
    domain: Tensor | None = None
    items: Tensor | None = None
    sizes: Sizes | None = None

    @property
    def host_sizes(self) -> Sizes:
        """`sizes`; where there are none, they are counted from the tensors once: the host waits."""
        if self.sizes is None:
            self.sizes = Sizes.of(self)
        return self.sizes

    @property
    def behaviors(self) -> int:
        """N."""
        return self.behavior_time.numel()

    @property
    def candidates(self) -> int:
        """C."""
        return self.candidate_request.numel()

    @property
    def requests(self) -> int:
        """R."""
        return self.request_time.numel()

    @property
    def candidate_items(self) -> Tensor | None:
        """`items`, or what `features` has of the candidates' items; None where the log has no items."""
        if self.items is not None or "item_id" not in self.features.keys():  # noqa: SIM118 - no dict
            return self.items
        of_all: Tensor = self.features["item_id"].values()
        return of_all[self.behaviors :]

    def problem(self, rows: Mapping[str, int], longest: int) -> str:
        """What is wrong with a batch that did not come from the reader; empty if it can be scored.

        Args:
            rows: feature -> table rows; longest: most behaviors of a window.
        """
        n, c, r = self.behaviors, self.candidates, self.requests
        request, start, end = self.candidate_request, self.window_start, self.window_end
        sizes = [part.numel() for part in (start, end, self.seen, self.user_id, self.request_id)]
        if (
            any(size != r for size in sizes)
            or self.labels.shape[:1] != (c,)
            or self.numeric.shape[:1] != (c,)
            or (self.task_weight is not None and self.task_weight.shape != self.labels.shape)
            or (self.domain is not None and self.domain.shape != (c,))
        ):
            return "its parts differ in length"
        if c and (request.min() < 0 or request.max() >= r or (request.diff() < 0).any()):
            return "candidates name requests that are not there, or out of order"
        if r and (start.min() < 0 or (start > end).any() or end.max() > n or (end - start).max() > longest):
            return "windows lie outside the behaviors"
        if problem := self._problem_of_cut(n, c, r):
            return problem
        for kjt, stride in ((self.features, n + c), (self.context, r)):
            if kjt is not None and (problem := _bag_problem(kjt, rows, stride)):
                return problem
        return ""

    def _problem_of_cut(self, n: int, c: int, r: int) -> str:
        """What is wrong with the retrieval or the clusters."""
        if self.retrieval is not None:
            index = self.retrieval.index
            if index.shape[0] != c or (index.numel() and (index.min() < -1 or index.max() >= n)):
                return "retrieved behaviors are not there"
        if self.clusters is not None:
            lengths = [part.numel() for part in (self.clusters.size, self.clusters.time, self.clusters.until)]
            if lengths != [n] * 3 or self.clusters.end.numel() != r or (self.clusters.size < 0).any():
                return "its clusters do not fit its behaviors"
        return ""


def _bag_problem(kjt: KeyedJaggedTensor, rows: Mapping[str, int], stride: int) -> str:
    lengths = kjt.lengths()
    if (
        lengths.numel() != stride * len(kjt.keys())
        or (lengths < 0).any()
        or lengths.sum() != kjt.values().numel()
    ):
        return "bags do not add up to the ids"
    for key in kjt.keys():  # noqa: SIM118 - no dict
        ids = kjt[key].values()
        if key in rows and ids.numel() and (ids.min() < 0 or ids.max() >= rows[key]):
            return f"ids of {key} lie outside the table of {rows[key]} rows"
    return ""


def pinning(device: torch.device) -> Callable[[RequestBatch], RequestBatch] | None:
    """A function that puts a batch into pinned memory, from where it is copied while the host goes on.

    It may be called in any thread: in the reader's, pinning costs training no time. None where the device is
    no GPU.
    """
    if device.type != "cuda":
        return None

    def pin(batch: RequestBatch) -> RequestBatch:
        # A new thread uses the first device until told otherwise, and would open a CUDA context on it.
        torch.cuda.set_device(device)
        return batch.pin_memory()

    return pin
