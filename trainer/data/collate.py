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

from trainer.config.sections import DataConfig
from trainer.data.batch import Clusters, RequestBatch, Retrieval
from trainer.data.blocks import Block
from trainer.data.hard_search import hierarchical_search
from trainer.data.row_group import Chosen, FeatureIds, Floats, Ids, Ints
from trainer.data.rows import Columns, UserRows
from trainer.data.sizes import Sizes

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
    level: npt.NDArray[np.int32]
    rank: npt.NDArray[np.int32]
    counts: Floats


@dataclass(frozen=True)
class _Laid:
    """Blocks side by side, nothing cut yet.

    Attributes:
        rows: each block's row group; first: its first request there; sizes: [blocks], requests of each.
        requests: [7, R] of `WindowedRows`; spans, candidates: stretches of behaviors and candidates.
    """

    rows: list[UserRows]
    first: list[int]
    sizes: Ints
    requests: Ints
    spans: list[slice]
    candidates: list[slice]

    @property
    def of_requests(self) -> list[slice]:
        return [slice(a, a + n) for a, n in zip(self.first, self.sizes.tolist(), strict=True)]


@dataclass(frozen=True)
class _Histories:
    """What is delivered of the blocks' histories.

    Attributes:
        chosen: behaviors of each block; base: [blocks], where they begin in the batch; total: N.
        start, end: [R], windows in the batch.
        found, clusters: of a hard search, or where clusters are read.
        most_clusters: that a request may see.
    """

    chosen: Sequence[Chosen]
    base: Ints
    total: int
    start: Ints
    end: Ints
    found: Sequence[_Found] = ()
    clusters: Clusters | None = None
    most_clusters: int = 0


def collate(
    blocks: Sequence[Block], config: DataConfig, columns: Columns, step_candidates: int
) -> RequestBatch:
    """At least one block as a batch; `step_candidates` counts the candidates of all ranks."""
    laid = _lay(blocks)
    rows, candidates = laid.rows, laid.candidates
    user, name, time, start, end, first_candidate, last_candidate = laid.requests
    counts = last_candidate - first_candidate
    total = int(counts.sum())
    past = _histories(laid, config, columns)
    sides = [
        _Side([r.history for r in rows], past.chosen, past.total),
        _Side([r.candidates for r in rows], candidates, total),
    ]
    features, bags = _jagged(list(columns.features), sides)
    labels = _tensor([r.labels[at] for r, at in zip(rows, candidates, strict=True)])
    return RequestBatch(
        features=features,
        behavior_time=_tensor([r.history_time[at] for r, at in zip(rows, past.chosen, strict=True)]),
        request_time=torch.from_numpy(time),
        window_start=torch.from_numpy(past.start),
        window_end=torch.from_numpy(past.end),
        seen=torch.from_numpy(end - start),
        user_id=torch.from_numpy(user),
        request_id=torch.from_numpy(name),
        candidate_request=torch.from_numpy(np.repeat(np.arange(counts.size), counts)),
        labels=labels,
        weight=_weights(laid, columns, total),
        numeric=_numeric(rows, candidates, past.found, columns, total),
        context=_context(rows, laid.of_requests, columns, counts.size),
        retrieval=_retrieval(past.found, past.base) if past.found else None,
        step_candidates=step_candidates,
        clusters=past.clusters,
        sizes=Sizes(
            tuple((past.end - past.start).tolist()),
            tuple(past.start.tolist()),
            tuple(counts.tolist()),
            bags,
            features.length_per_key() == [features.stride()] * len(bags) and max(bags, default=1) <= 1,
            past.most_clusters,
            not bool(labels.isnan().any()),
        ),
    )


def _weights(laid: _Laid, columns: Columns, total: int) -> torch.Tensor:
    if not columns.weighted:
        return torch.from_numpy(np.ones(total, dtype=np.float32))
    return _tensor([r.weight[at] for r, at in zip(laid.rows, laid.candidates, strict=True)])


def _lay(blocks: Sequence[Block]) -> _Laid:
    parts = [block.rows() for block in blocks]
    of_requests = [slice(block.first, block.last) for block in blocks]
    requests = np.concatenate(
        [part.requests[:, at] for part, at in zip(parts, of_requests, strict=True)], axis=1
    )
    _, _, _, start, end, first_candidate, last_candidate = requests
    sizes = np.array([block.last - block.first for block in blocks])
    after = np.cumsum(sizes)
    before = after - sizes
    low, high = np.minimum.reduceat(start, before), np.maximum.reduceat(end, before)
    return _Laid(
        [part.rows for part in parts],
        [block.first for block in blocks],
        sizes,
        requests,
        list(map(slice, low.tolist(), high.tolist())),
        list(map(slice, first_candidate[before].tolist(), last_candidate[after - 1].tolist())),
    )


def _histories(laid: _Laid, config: DataConfig, columns: Columns) -> _Histories:
    """Whole stretches, or what a hard search or clusters leave of them."""
    if not config.search.levels and not columns.chunk:
        lengths = np.array([span.stop - span.start for span in laid.spans])
        base = np.cumsum(lengths) - lengths
        shift = np.repeat(base - np.array([span.start for span in laid.spans]), laid.sizes)
        start, end = laid.requests[3] + shift, laid.requests[4] + shift
        return _Histories(laid.spans, base, int(lengths.sum()), start, end)
    of_block = np.split(laid.requests, np.cumsum(laid.sizes)[:-1], axis=1)
    found: list[_Found] = []
    clusters, most = None, 0
    if columns.chunk:
        until = [_until(r, first, columns.chunk) for r, first in zip(laid.rows, laid.first, strict=True)]
        each = zip(laid.rows, laid.spans, of_block, until, strict=True)
        cuts = [_summarise(*block, config.recent) for block in each]
        clusters = _clusters(laid.rows, cuts, until, laid.requests[4])
        most = max(map(_most_clusters, laid.rows, cuts, of_block, until))
    else:
        each_searched = zip(laid.rows, laid.spans, laid.candidates, of_block, strict=True)
        found = [_search(*block, config) for block in each_searched]
        cuts = list(found)
    lengths = np.array([cut.kept.size for cut in cuts])
    base = np.cumsum(lengths) - lengths
    shift = np.repeat(base, laid.sizes)
    start = np.concatenate([cut.start for cut in cuts]) + shift
    end = np.concatenate([cut.end for cut in cuts]) + shift
    kept = [cut.kept for cut in cuts]
    return _Histories(kept, base, int(lengths.sum()), start, end, found, clusters, most)


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


def _most_clusters(rows: UserRows, cut: _Cut, requests: Ints, until: Callable[[Ints], Ints]) -> int:
    """Most clusters that a request of the block sees: those that stand in its window, of complete chunks."""
    assert rows.cluster_size is not None
    stands = cut.kept[rows.cluster_size[cut.kept] > 0]
    before = np.searchsorted(stands, requests[3])
    return int((np.searchsorted(until(stands), requests[4], side="right") - before).max())


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
        found.level.astype(np.int32),
        np.where(found.index >= 0, np.repeat(end, counts)[:, None] - found.index, 0).astype(np.int32),
        matches if search.counts else matches[:, :0],
    )


def _context(
    rows: Sequence[UserRows], requests: Sequence[slice], columns: Columns, total: int
) -> KeyedJaggedTensor | None:
    if not columns.context:
        return None
    return _jagged(list(columns.context), [_Side([r.context for r in rows], requests, total)])[0]


class _Side(NamedTuple):
    """Behaviors, candidates or requests: of each block's row group the chosen ones, `total` in all."""

    features: Sequence[FeatureIds]
    chosen: Sequence[Chosen]
    total: int


def _jagged(keys: list[str], sides: Sequence[_Side]) -> tuple[KeyedJaggedTensor, tuple[int, ...]]:
    """Key by key, all of one side, then all of the next; a side without the feature has empty bags.

    Also the most ids of a bag, of each key.
    """
    stride = sum(side.total for side in sides)
    single = []
    for features, chosen, _ in sides:
        ids = np.concatenate([part.ids[:, at] for part, at in zip(features, chosen, strict=True)], axis=1)
        single.append(dict(zip(features[0].single, ids, strict=True)))
    values: list[Ids] = []
    lengths = np.ones(len(keys) * stride, dtype=np.int32)
    held, most = [], []
    begin = 0
    for key in keys:
        before, longest = len(values), 0
        for (features, chosen, total), ids_of in zip(sides, single, strict=True):
            if key in ids_of:
                values.append(ids_of[key])
                longest = max(longest, min(total, 1))
            elif key in features[0].multi:
                bags = [part.multi[key].select(at) for part, at in zip(features, chosen, strict=True)]
                values += [ids for ids, _ in bags]
                sizes = np.concatenate([sizes for _, sizes in bags])
                lengths[begin : begin + total] = sizes
                longest = max(longest, int(sizes.max(initial=0)))
            else:
                lengths[begin : begin + total] = 0
            begin += total
        held.append(sum(part.size for part in values[before:]))
        most.append(longest)
    kjt = KeyedJaggedTensor(
        keys=keys,
        values=torch.from_numpy(np.concatenate(values, dtype=np.int64)),
        lengths=torch.from_numpy(lengths),
        stride=stride,
        # TorchRec would ask the device for it, in each collection.
        length_per_key=held,
    )
    return kjt, tuple(most)


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
