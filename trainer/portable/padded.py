"""Padded tensors as the batch that the model's own modules read.

A request's behaviors are a stretch of X places, oldest first, and padding after them; those of all requests
lie one after the other, and so do their candidates. Sizes are those of the tensors: while a model is exported
they are symbols, and nothing here looks into a tensor.

Shapes: B requests, L behaviors and C candidates of a request, X places of a stretch, M ids of a bag.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.data.batch import Clusters, RequestBatch, Retrieval

NO_ID = -1


@dataclass(frozen=True)
class PaddedBag:
    """The bags of one feature, laid out as a jagged tensor's are, with room for the most ids in each."""

    ids_BM: Tensor

    def lengths(self) -> Tensor:
        return (self.ids_BM >= 0).to(torch.int64).sum(1)

    def offsets(self) -> Tensor:
        bags, most = self.ids_BM.shape
        return torch.arange(bags + 1) * most

    def values(self) -> Tensor:
        return self.ids_BM.reshape(-1)


@dataclass(frozen=True)
class PaddedBags:
    """What stands for a KeyedJaggedTensor: the padded ids of features.

    Attributes:
        ids: key -> of each side (behaviors and candidates, or requests), int64 [bags], or [bags, M] padded
            with -1; None on a side that has none of the feature.
        counts: bags of each side.
    """

    ids: Mapping[str, Sequence[Tensor | None]]
    counts: Sequence[int]

    def sides(self, key: str) -> Iterator[tuple[Tensor | None, int]]:
        return zip(self.ids[key], self.counts, strict=True)

    def keys(self) -> list[str]:
        return list(self.ids)

    def stride(self) -> int:
        return sum(self.counts)

    def most(self, key: str) -> int:
        """M of a feature."""
        return max(1 if ids is None or ids.dim() == 1 else ids.shape[1] for ids in self.ids[key])

    def __getitem__(self, key: str) -> PaddedBag:
        parts = []
        for ids, count in self.sides(key):
            if ids is None:
                parts.append(torch.full((count, self.most(key)), NO_ID))
            else:
                parts.append(ids if ids.dim() == 2 else ids[:, None])
        return PaddedBag(torch.cat(parts))


@dataclass(frozen=True)
class PaddedSizes:
    """What stands for `trainer.data.batch.Sizes`.

    Attributes:
        width: X; clusters: the same where a request sees clusters; candidates: C, of every request.
        bags: M of each feature; one_id: nothing is known.
    """

    width: int
    candidates: tuple[int]
    bags: tuple[int, ...]
    one_id: bool = False

    @property
    def clusters(self) -> int:
        return self.width

    def longest(self, newest: int = 0) -> int:
        return min(self.width, newest) if newest else self.width


class Retrieved(NamedTuple):
    """What a hard search in the data path kept, int64 [B, C, kept] each: place in the request's history, -1
    where there is none, level and rank as in `trainer.data.batch.Retrieval`."""

    place: Tensor
    level: Tensor
    rank: Tensor


class Clustered(NamedTuple):
    """Clusters as in `trainer.data.batch.Clusters`: int64 [B, X] each, and `end`, int64 [B]."""

    size: Tensor
    time: Tensor
    until: Tensor
    end: Tensor


@dataclass(frozen=True)
class PaddedRequests:
    """The parts of padded requests that are no ids.

    Attributes:
        length: int64 [B], behaviors; behavior_time: int64 [B, X], seconds; request_time: int64 [B].
        candidates: C; numeric: float32 [B, C, numbers]; domain: int64 [B, C] or None.
        retrieved: what a hard search in the data path kept; clustered: clusters of the histories.
    """

    length: Tensor
    behavior_time: Tensor
    request_time: Tensor
    candidates: int
    numeric: Tensor
    domain: Tensor | None = None
    retrieved: Retrieved | None = None
    clustered: Clustered | None = None

    def batch(self, features: PaddedBags, context: PaddedBags | None) -> RequestBatch:
        """The batch that the model's modules read."""
        (requests, width), candidates = self.behavior_time.shape, self.candidates
        start = torch.arange(requests) * width
        of_candidate = torch.arange(requests)[:, None].expand(requests, candidates).reshape(-1)
        none = torch.zeros(requests, dtype=torch.int64)
        numeric = self.numeric.flatten(0, 1)
        sizes = PaddedSizes(width, (candidates,), tuple(features.most(key) for key in features.keys()))  # noqa: SIM118
        return RequestBatch(
            features=cast("Any", features),
            behavior_time=self.behavior_time.reshape(-1),
            request_time=self.request_time,
            window_start=start,
            window_end=start + self.length,
            seen=self.length,
            user_id=none,
            request_id=none,
            candidate_request=of_candidate,
            labels=numeric.new_zeros(numeric.shape[0], 1),
            weight=numeric.new_ones(numeric.shape[0]),
            numeric=numeric,
            context=cast("Any", context),
            retrieval=self._retrieval(start),
            step_candidates=1,
            clusters=self._clusters(),
            domain=None if self.domain is None else self.domain.reshape(-1),
            sizes=cast("Any", sizes),
        )

    def _retrieval(self, start: Tensor) -> Retrieval | None:
        if self.retrieved is None:
            return None
        place, level, rank = self.retrieved
        index = torch.where(place >= 0, place + start[:, None, None], -1)
        return Retrieval(*(part.flatten(0, 1) for part in (index, level, rank)))

    def _clusters(self) -> Clusters | None:
        if self.clustered is None:
            return None
        size, time, until, end = self.clustered
        return Clusters(size.reshape(-1), time.reshape(-1), until.reshape(-1), end)


def widened(part_BL: Tensor, more: int, value: int = 0) -> Tensor:
    """[B, L, ...] -> [B, L + more, ...]."""
    after = [0, 0] * (part_BL.dim() - 2)
    return F.pad(part_BL, (*after, 0, more), value=value)
