"""What a reader delivers of each request, as digests that can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.config.sections import DataConfig
from trainer.data.batch import RequestBatch
from trainer.data.reader import SequenceLogReader

Key = tuple[int, int]  # user, request
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class View:
    """One request as the reader delivers it, as digests of the bytes.

    Attributes:
        history: its window, or with a hard search what each candidate retrieved; together with the context.
        times: the window in no order within a second, where asked for.
        candidates: ids, labels, weights and numbers in their order; positives: ids whose first label is 1.
    """

    time: int
    history: bytes
    times: bytes
    candidates: bytes
    positives: bytes


@dataclass(frozen=True)
class Selection:
    """The requests that are compared, and how.

    Attributes:
        before: only older ones; every: only of users whose number is divisible by it.
        words: feature -> what its ids are translated to; loose: also digest windows unordered in a second.
    """

    before: int = 2**62
    every: int = 1
    words: Mapping[str, Ints] = field(default_factory=dict)
    loose: bool = False


def views(data: DataConfig, split: str, selection: Selection) -> dict[Key, View]:
    """The requests of a split."""
    requests = {}
    for step in SequenceLogReader(data, split, None).steps():
        arrays = _Batch(step.batch, selection)
        names = zip(step.batch.user_id.tolist(), step.batch.request_id.tolist(), strict=True)
        for r, (time, key) in enumerate(zip(step.batch.request_time.tolist(), names, strict=True)):
            if time < selection.before and key[0] % selection.every == 0:
                requests[key] = arrays.view(r, time)
    return requests


class _Batch:
    """The arrays of a batch."""

    def __init__(self, batch: RequestBatch, selection: Selection) -> None:
        self.batch, self.n, self.loose = batch, batch.behaviors, selection.loose
        self.features = _bags(batch.features, selection.words)
        self.context = {} if batch.context is None else _bags(batch.context, selection.words)
        self.time = batch.behavior_time.numpy()
        self.start, self.end = batch.window_start.tolist(), batch.window_end.tolist()
        owner = batch.candidate_request.numpy()
        self.first = np.searchsorted(owner, np.arange(batch.requests + 1))
        self.numbers = [batch.labels.numpy(), batch.weight.numpy()[:, None], batch.numeric.numpy()]

    def view(self, r: int, time: int) -> View:
        low, high = int(self.first[r]), int(self.first[r + 1])
        parts = [bags.part(r, r + 1) for bags in self.context.values()]
        retrieval = self.batch.retrieval
        times = b""
        if retrieval is None:
            start, end = self.start[r], self.end[r]
            ids = [bags.part(start, end) for bags in self.features.values()]
            history = digest([self.time[start:end], *ids, *parts])
            times = digest(self._unordered(start, end)) if self.loose else b""
        else:
            index = retrieval.index[low:high].numpy()
            there = index[index >= 0]
            ids = [bags.take(there) for bags in self.features.values()]
            level, rank = retrieval.level[low:high].numpy(), retrieval.rank[low:high].numpy()
            history = digest([index >= 0, level, rank, self.time[there], *ids, *parts])
        offered = [bags.part(self.n + low, self.n + high) for bags in self.features.values()]
        numbers = [values[low:high] for values in self.numbers]
        bought = np.nonzero(self.batch.labels[low:high, 0].numpy() == 1)[0]
        item = next(iter(self.features.values()))
        positives = np.sort(item.take(self.n + low + bought))
        return View(time, history, times, digest([*offered, *numbers]), digest([positives]))

    def _unordered(self, start: int, end: int) -> list[npt.NDArray[Any]]:
        single = [bags.part(start, end) for bags in self.features.values() if bags.single]
        columns = [*reversed([part for part in single if part.size == end - start]), self.time[start:end]]
        order = np.lexsort(columns)
        return [column[order] for column in columns]


@dataclass(frozen=True)
class _Bags:
    values: Ints
    offsets: Ints
    single: bool

    def part(self, begin: int, end: int) -> Ints:
        """Ids of consecutive bags. Where bags vary in size, the sizes come first."""
        ids = self.values[self.offsets[begin] : self.offsets[end]]
        return ids if self.single else np.r_[np.diff(self.offsets[begin : end + 1]), ids]

    def take(self, chosen: Ints) -> Ints:
        if self.single:
            return self.values[chosen]
        return np.concatenate([np.zeros(0, np.int64), *(self.part(int(i), int(i) + 1) for i in chosen)])


def _bags(kjt: KeyedJaggedTensor, words: Mapping[str, Ints]) -> dict[str, _Bags]:
    found = {}
    for key in kjt.keys():  # noqa: SIM118 - no dict
        values, lengths = kjt[key].values().numpy(), kjt[key].lengths().numpy()
        values = words[key][values] if key in words else values
        found[key] = _Bags(values, np.r_[0, np.cumsum(lengths, dtype=np.int64)], bool((lengths == 1).all()))
    return found


def digest(parts: Sequence[npt.NDArray[Any]]) -> bytes:
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        total.update(f"{part.shape}{part.dtype}".encode())
        total.update(np.ascontiguousarray(part).tobytes())
    return total.digest()


def same_batch(one: RequestBatch, other: RequestBatch) -> bool:
    """Whether two batches are equal bit for bit, tensor by tensor."""
    return all(same(getattr(one, part.name), getattr(other, part.name)) for part in fields(one))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        # A label that was not observed is NaN, which equals nothing.
        filled = [part.nan_to_num(-1.0) if part.is_floating_point() else part for part in (one, other)]
        return one.dtype == other.dtype and torch.equal(*filled)
    if isinstance(one, KeyedJaggedTensor):
        parts = [(kjt.keys(), kjt.stride(), kjt.values(), kjt.lengths()) for kjt in (one, other)]
        return all(same(a, b) for a, b in zip(*parts, strict=True))
    if hasattr(one, "__dataclass_fields__"):
        return all(same(getattr(one, part.name), getattr(other, part.name)) for part in fields(one))
    return bool(one == other)


def batches_of(data: DataConfig, split: str) -> Iterator[RequestBatch]:
    return (step.batch for step in SequenceLogReader(data, split, None).steps())
