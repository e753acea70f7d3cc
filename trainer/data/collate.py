"""Laying blocks end to end in a RequestBatch.

A step takes stretches of many decoded columns. They are cut as views and joined by one concatenation a
field, all ids by a single one, so that every value is copied once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.config import DataConfig
from trainer.data.batch import Clusters, RequestBatch, Retrieval
from trainer.data.blocks import Block
from trainer.data.hard_search import hierarchical_search
from trainer.data.rows import Chosen, Columns, FeatureIds, Floats, Ids, Ints, UserRows

_DAY = 86_400.0


@dataclass(frozen=True)
class _Cut:
    """What is delivered of one block's history.

    Attributes:
        kept: [n], behaviors, counted from the row group's first.
        start, end: [r], windows among those n.
    """

    kept: Ints
    start: Ints
    end: Ints


@dataclass(frozen=True)
class _Found(_Cut):
    """What a hard search leaves of one block.

    Attributes:
        index, level, rank: [c, B] as in `Retrieval`, index among the kept behaviors.
        counts: [c, x], match counts.
    """

    index: Ints
    level: Ints
    rank: Ints
    counts: Floats


def collate(
    blocks: Sequence[Block], config: DataConfig, columns: Columns, step_candidates: int
) -> RequestBatch:
    """At least one block as a batch; `step_candidates` counts the candidates of all ranks."""
    parts = [block.rows() for block in blocks]
    rows = [part.rows for part in parts]
    of_requests = [slice(block.first, block.last) for block in blocks]
    requests = np.concatenate(
        [part.requests[:, at] for part, at in zip(parts, of_requests, strict=True)], axis=1
    )
    user, name, time, start, end, first_candidate, last_candidate = requests
    sizes = np.array([block.last - block.first for block in blocks])
    after = np.cumsum(sizes)
    before = after - sizes
    low, high = np.minimum.reduceat(start, before), np.maximum.reduceat(end, before)
    spans = list(map(slice, low.tolist(), high.tolist()))
    candidates = list(map(slice, first_candidate[before].tolist(), last_candidate[after - 1].tolist()))
    counts, seen = last_candidate - first_candidate, end - start
    history: Sequence[Chosen] = spans
    lengths = high - low
    found: list[_Found] = []
    clusters = None
    if config.search.levels or columns.chunk:
        of_block = np.split(requests, after[:-1], axis=1)
        if columns.chunk:
            firsts = [block.first for block in blocks]
            until = [_until(r, first, columns.chunk) for r, first in zip(rows, firsts, strict=True)]
            cuts = [
                _summarise(*block, config.recent) for block in zip(rows, spans, of_block, until, strict=True)
            ]
            clusters = _clusters(rows, cuts, until, end)
        else:
            found = [_search(*block, config) for block in zip(rows, spans, candidates, of_block, strict=True)]
            cuts = list(found)
        history = [part.kept for part in cuts]
        lengths, low = np.array([part.kept.size for part in cuts]), np.zeros_like(low)
        start = np.concatenate([part.start for part in cuts])
        end = np.concatenate([part.end for part in cuts])
    base = np.cumsum(lengths) - lengths
    shift = np.repeat(base - low, sizes)
    total = int(counts.sum())
    return RequestBatch(
        features=_jagged(
            list(columns.features),
            [
                _Side([r.history for r in rows], history, int(lengths.sum())),
                _Side([r.candidates for r in rows], candidates, total),
            ],
        ),
        behavior_time=_tensor([r.history_time[chosen] for r, chosen in zip(rows, history, strict=True)]),
        request_time=torch.from_numpy(time),
        window_start=torch.from_numpy(start + shift),
        window_end=torch.from_numpy(end + shift),
        seen=torch.from_numpy(seen),
        user_id=torch.from_numpy(user),
        request_id=torch.from_numpy(name),
        candidate_request=torch.from_numpy(np.repeat(np.arange(counts.size), counts)),
        labels=_tensor([r.labels[chosen] for r, chosen in zip(rows, candidates, strict=True)]),
        weight=_tensor([r.weight[chosen] for r, chosen in zip(rows, candidates, strict=True)])
        if columns.weighted
        else torch.from_numpy(np.ones(total, dtype=np.float32)),
        numeric=_numeric(rows, candidates, found, columns, total),
        context=_context(rows, of_requests, columns, counts.size),
        retrieval=_retrieval(found, base) if found else None,
        step_candidates=step_candidates,
        clusters=clusters,
    )


def _until(rows: UserRows, request: int, chunk: int) -> Callable[[Ints], Ints]:
    """Of a request's user: behaviors, counted from the row group's first -> where their chunks end."""
    user = int(np.searchsorted(rows.request_offsets, request, side="right")) - 1
    base = int(rows.history_offsets[user])
    return lambda behaviors: base + ((behaviors - base) // chunk + 1) * chunk


def _summarise(
    rows: UserRows, history: slice, requests: Ints, until: Callable[[Ints], Ints], recent: int
) -> _Cut:
    """Keep the behaviors that stand for clusters which some request of the block sees, and recent ones."""
    assert rows.cluster_size is not None
    start, end = requests[3] - history.start, requests[4] - history.start
    stands = np.nonzero(rows.cluster_size[history])[0]
    stands = stands[until(history.start + stands) <= history.stop]
    kept = np.union1d(stands, _newest(start, end, recent))
    return _Cut(history.start + kept, np.searchsorted(kept, start), np.searchsorted(kept, end))


def _newest(start: Ints, end: Ints, recent: int) -> Ints:
    """The newest `recent` behaviors of each window, ascending."""
    seen = np.zeros(int(end.max()), dtype=bool)
    for first, last in zip(np.maximum(start, end - recent).tolist(), end.tolist(), strict=True):
        seen[first:last] = True
    return np.nonzero(seen)[0]


def _clusters(
    rows: Sequence[UserRows], cuts: Sequence[_Cut], until: Sequence[Callable[[Ints], Ints]], end: Ints
) -> Clusters:
    kept = [cut.kept for cut in cuts]
    return Clusters(
        size=_tensor(
            [r.cluster_size[at] for r, at in zip(rows, kept, strict=True) if r.cluster_size is not None]
        ),
        time=_tensor(
            [r.cluster_time[at] for r, at in zip(rows, kept, strict=True) if r.cluster_time is not None]
        ),
        until=_tensor([ends(at) for ends, at in zip(until, kept, strict=True)]),
        end=torch.from_numpy(end.copy()),
    )


def _search(rows: UserRows, history: slice, candidates: slice, requests: Ints, config: DataConfig) -> _Found:
    """Keep only the behaviors that the hard search retrieves for some candidate of a block."""
    search = config.search
    _, _, time, start, end, first_candidate, last_candidate = requests
    start, end, counts = start - history.start, end - history.start, last_candidate - first_candidate
    found = hierarchical_search(
        np.stack([rows.history[level].values[history] for level in search.levels], dtype=np.int64),
        rows.history_time[history],
        np.stack([rows.candidates[level].values[candidates] for level in search.levels], dtype=np.int64),
        np.repeat(np.arange(end.size), counts),
        start,
        end,
        time,
        search.budget,
        search.half_life_days * _DAY,
        rows.history[search.domain].values[history].astype(np.int64) if search.domain else None,
        search.domain_minimum or None,
    )
    kept = np.union1d(found.index[found.index >= 0], _newest(start, end, config.recent))
    place = np.searchsorted(kept, found.index.clip(min=0))
    matches = np.concatenate([found.matches, found.decayed], axis=1).astype(np.float32)
    return _Found(
        history.start + kept,
        np.searchsorted(kept, start),
        np.searchsorted(kept, end),
        np.where(found.index >= 0, place, -1),
        found.level.astype(np.int64),
        np.where(found.index >= 0, np.repeat(end, counts)[:, None] - found.index, 0),
        matches if search.counts else matches[:, :0],
    )


def _context(
    rows: Sequence[UserRows], requests: Sequence[slice], columns: Columns, total: int
) -> KeyedJaggedTensor | None:
    if not columns.context:
        return None
    return _jagged(list(columns.context), [_Side([r.context for r in rows], requests, total)])


class _Side(NamedTuple):
    """Behaviors, candidates or requests: of each block's row group the chosen ones, `total` in all."""

    features: Sequence[FeatureIds]
    chosen: Sequence[Chosen]
    total: int


def _jagged(keys: list[str], sides: Sequence[_Side]) -> KeyedJaggedTensor:
    """Key by key, all of one side, then all of the next; a side without the feature has empty bags."""
    stride = sum(side.total for side in sides)
    single = []
    for features, chosen, _ in sides:
        ids = np.concatenate([part.ids[:, at] for part, at in zip(features, chosen, strict=True)], axis=1)
        single.append(dict(zip(features[0].single, ids, strict=True)))
    values: list[Ids] = []
    lengths = np.ones(len(keys) * stride, dtype=np.int32)
    begin = 0
    for key in keys:
        for (features, chosen, total), ids_of in zip(sides, single, strict=True):
            if key in ids_of:
                values.append(ids_of[key])
            elif key in features[0].multi:
                bags = [part.multi[key].select(at) for part, at in zip(features, chosen, strict=True)]
                values += [ids for ids, _ in bags]
                lengths[begin : begin + total] = np.concatenate([sizes for _, sizes in bags])
            else:
                lengths[begin : begin + total] = 0
            begin += total
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.from_numpy(np.concatenate(values, dtype=np.int64)),
        lengths=torch.from_numpy(lengths),
        stride=stride,
    )


def _numeric(
    rows: Sequence[UserRows],
    candidates: Sequence[slice],
    found: Sequence[_Found],
    columns: Columns,
    count: int,
) -> torch.Tensor:
    """The log's numbers, then the hard search's match counts: [C, X]."""
    parts = [np.zeros((count, 0), dtype=np.float32)]
    if columns.numeric:
        parts.append(np.concatenate([r.numeric[chosen] for r, chosen in zip(rows, candidates, strict=True)]))
    if found:
        parts.append(np.concatenate([part.counts for part in found]))
    return torch.from_numpy(np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0])


def _retrieval(found: Sequence[_Found], base: Ints) -> Retrieval:
    index = [np.where(part.index >= 0, part.index + at, -1) for part, at in zip(found, base, strict=True)]
    return Retrieval(
        index=_tensor(index),
        level=_tensor([part.level for part in found]),
        rank=_tensor([part.rank for part in found]),
    )


def _tensor(parts: Sequence[npt.NDArray[np.generic]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts))
