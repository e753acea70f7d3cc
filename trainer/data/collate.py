"""Laying blocks end to end in a RequestBatch.

A step takes stretches of many decoded columns. They are cut as views and joined by one concatenation a
field, all ids by a single one, so that every value is copied once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.config.sections import DataConfig
from trainer.data.batch import Clusters, RequestBatch, Retrieval, Sizes, label_counts
from trainer.data.blocks import Block, Selection, newest_behaviors
from trainer.data.clusters import ClusteredBlock, join_clusters
from trainer.data.hard_search import hierarchical_search
from trainer.data.row_group import FeatureIds, Floats
from trainer.data.rows import Columns, UserRows
from trainer.data.similarity.similarity import BlockIds, Similarity
from trainer.log.bags import Bags, Chosen, Ids, Ints, offsets_of
from trainer.log.encoders.encoder import Encoder
from trainer.log.schema import FeatureInfo

_DAY = 86_400.0


@dataclass(frozen=True)
class _BlockRetrieval:
    """What a hard search keeps of one block.

    Attributes:
        selection: the behaviors that it keeps for some candidate, and recent ones.
        index, level, rank: [c, B] as in `Retrieval`, index among the selection's behaviors.
        counts: [c, x], match counts.
    """

    selection: Selection
    index: Ints
    level: npt.NDArray[np.int32]
    rank: npt.NDArray[np.int32]
    counts: Floats


@dataclass(frozen=True)
class _Stretches:
    """Where the data of each block lies in its row group.

    Attributes:
        rows: each block's row group; of_requests: its requests there; sizes: [blocks], their number.
        requests: [7, R] of `WindowedRows`; spans, candidates: stretches of behaviors and candidates.
    """

    rows: list[UserRows]
    of_requests: list[slice]
    sizes: Ints
    requests: Ints
    spans: list[slice]
    candidates: list[slice]

    @property
    def placed(self) -> list[tuple[UserRows, slice]]:
        """Each block's row group, and its candidates there."""
        return list(zip(self.rows, self.candidates, strict=True))


class _Histories(NamedTuple):
    """The behaviors that a batch holds, N in all.

    Attributes:
        chosen: behaviors of each block, in its row group; offsets: [blocks + 1], where they are in the batch.
        start, end: [R], windows in the batch.
        retrievals: of a hard search, one a block; clusters: where clusters are read.
        most_clusters: that a request may see.
    """

    chosen: Sequence[Chosen]
    offsets: Ints
    start: Ints
    end: Ints
    retrievals: Sequence[_BlockRetrieval] = ()
    clusters: Clusters | None = None
    most_clusters: int = 0


def collate(
    blocks: Sequence[Block], config: DataConfig, columns: Columns, step_candidates: int
) -> RequestBatch:
    """At least one block as a batch; `step_candidates` counts the candidates of all ranks."""
    stretches = _stretches(blocks)
    rows, candidates = stretches.rows, stretches.candidates
    user, name, time, start, end, first_candidate, last_candidate = stretches.requests
    counts = last_candidate - first_candidate
    total = int(counts.sum())
    past = _histories(stretches, config, columns)
    sides = [
        _Side([r.history for r in rows], past.chosen, int(past.offsets[-1])),
        _Side([r.candidates for r in rows], candidates, total),
    ]
    features, bags = _jagged(columns.features, sides, _similarities(stretches, columns))
    labels = _tensor([r.labels[at] for r, at in stretches.placed])
    task_weight = [r.task_weight[at] for r, at in stretches.placed if r.task_weight is not None]
    domain = [r.domain[at] for r, at in stretches.placed if r.domain is not None]
    # The log's numbers, then the hard search's match counts: [C, X].
    numeric = [r.numeric[at] for r, at in stretches.placed]
    if past.retrievals:
        matches = [part.counts for part in past.retrievals]
        numeric = [np.concatenate(part, axis=1) for part in zip(numeric, matches, strict=True)]
    context = None
    if columns.context:
        requests = _Side([r.context for r in rows], stretches.of_requests, counts.size)
        context, _ = _jagged(columns.context, [requests])
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
        weight=_tensor([r.weight[at] for r, at in stretches.placed]),
        numeric=_tensor(numeric),
        context=context,
        retrieval=_retrieval(past),
        step_candidates=step_candidates,
        clusters=past.clusters,
        task_weight=_tensor(task_weight) if task_weight else None,
        domain=_tensor(domain) if domain else None,
        sizes=Sizes(
            tuple((past.end - past.start).tolist()),
            tuple(past.start.tolist()),
            tuple(counts.tolist()),
            bags,
            features.length_per_key() == [features.stride()] * len(bags) and max(bags, default=1) <= 1,
            past.most_clusters,
            *label_counts(labels, counts),
        ),
    )


def _similarities(stretches: _Stretches, columns: Columns) -> dict[str, Bags]:
    """What similarities say of all candidates: of whole windows, whatever a search leaves of these."""
    found: dict[str, Bags] = {}
    requests = np.split(stretches.requests, np.cumsum(stretches.sizes)[:-1], axis=1)
    for similarity in columns.similarities:
        blocks = [
            _keys_of_block(similarity, *block)
            for block in zip(
                *(stretches.rows, stretches.spans, stretches.of_requests, stretches.candidates, requests),
                strict=True,
            )
        ]
        found |= similarity.bags(blocks)
    return found


def _keys_of_block(
    similarity: Similarity, rows: UserRows, span: slice, of_requests: slice, candidates: slice, requests: Ints
) -> BlockIds:
    """`requests`: [7, r] of `WindowedRows`."""
    user, _, _, start, end, first, last = requests
    behaviors: Ids | None = None
    others: Ids | None = None
    if similarity.of_behaviors:
        behaviors = rows.history[similarity.to.name].values[span]
    else:
        of_users = similarity.to.side == "users"
        others = user if of_users else rows.context[similarity.to.name].values[of_requests]
    own = rows.candidates[similarity.of.name].values[candidates]
    return BlockIds(behaviors, own, others, start - span.start, end - span.start, last - first)


def _retrieval(past: _Histories) -> Retrieval | None:
    """What a hard search kept of all blocks, as places in the batch; None without one."""
    if not past.retrievals:
        return None
    placed = zip(past.retrievals, past.offsets[:-1], strict=True)
    return Retrieval(
        index=_tensor([np.where(part.index >= 0, part.index + at, -1) for part, at in placed]),
        level=_tensor([part.level for part in past.retrievals]),
        rank=_tensor([part.rank for part in past.retrievals]),
    )


def _stretches(blocks: Sequence[Block]) -> _Stretches:
    parts = [block.rows() for block in blocks]
    of_requests = [slice(block.first, block.last) for block in blocks]
    requests = np.concatenate(
        [part.requests[:, at] for part, at in zip(parts, of_requests, strict=True)], axis=1
    )
    _, _, _, start, end, first_candidate, last_candidate = requests
    sizes = np.array([at.stop - at.start for at in of_requests])
    after = np.cumsum(sizes)
    before = after - sizes
    low, high = np.minimum.reduceat(start, before), np.maximum.reduceat(end, before)
    return _Stretches(
        [part.rows for part in parts],
        of_requests,
        sizes,
        requests,
        list(map(slice, low.tolist(), high.tolist())),
        list(map(slice, first_candidate[before].tolist(), last_candidate[after - 1].tolist())),
    )


def _histories(stretches: _Stretches, config: DataConfig, columns: Columns) -> _Histories:
    """Whole stretches, or what a hard search or clusters keep of them."""
    if not config.search.levels and not columns.chunk:
        spans = stretches.spans
        offsets = offsets_of([span.stop - span.start for span in spans])
        shift = np.repeat(offsets[:-1] - np.array([span.start for span in spans]), stretches.sizes)
        return _Histories(spans, offsets, stretches.requests[3] + shift, stretches.requests[4] + shift)
    rows, spans = stretches.rows, stretches.spans
    requests = np.split(stretches.requests, np.cumsum(stretches.sizes)[:-1], axis=1)
    retrievals: list[_BlockRetrieval] = []
    clusters, most = None, 0
    if columns.chunk:
        each = zip(rows, spans, stretches.of_requests, requests, strict=True)
        blocks = [ClusteredBlock(*block, columns.chunk, config.recent) for block in each]
        selections = [block.selection for block in blocks]
        clusters = join_clusters(blocks, stretches.requests[4])
        most = max(block.most_visible() for block in blocks)
    else:
        each_searched = zip(rows, spans, stretches.candidates, requests, strict=True)
        retrievals = [_search(*block, config) for block in each_searched]
        selections = [retrieval.selection for retrieval in retrievals]
    kept = [selection.kept for selection in selections]
    offsets = offsets_of([part.size for part in kept])
    shift = np.repeat(offsets[:-1], stretches.sizes)
    start = np.concatenate([selection.start for selection in selections]) + shift
    end = np.concatenate([selection.end for selection in selections]) + shift
    return _Histories(kept, offsets, start, end, retrievals, clusters, most)


def _search(
    rows: UserRows, history: slice, candidates: slice, requests: Ints, config: DataConfig
) -> _BlockRetrieval:
    """Keep only the behaviors that the hard search retrieves for some candidate of a block."""
    search = config.search
    _, _, time, start, end, first_candidate, last_candidate = requests
    start, end, counts = start - history.start, end - history.start, last_candidate - first_candidate
    retrieved = hierarchical_search(
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
    kept = np.union1d(retrieved.index[retrieved.index >= 0], newest_behaviors(start, end, config.recent))
    place = np.searchsorted(kept, retrieved.index.clip(min=0))
    matches = np.concatenate([retrieved.matches, retrieved.decayed], axis=1).astype(np.float32)
    return _BlockRetrieval(
        Selection.of(history, kept, start, end),
        np.where(retrieved.index >= 0, place, -1),
        retrieved.level.astype(np.int32),
        np.where(retrieved.index >= 0, np.repeat(end, counts)[:, None] - retrieved.index, 0).astype(np.int32),
        matches if search.counts else matches[:, :0],
    )


class _Side(NamedTuple):
    """Behaviors, candidates or requests: of each block's row group the chosen ones, `total` in all."""

    features: Sequence[FeatureIds]
    chosen: Sequence[Chosen]
    total: int

    def columns(self, names: Collection[str]) -> dict[str, _Bags]:
        """The bags of each feature; of one that the side does not have, they are empty."""
        first, found = self.features[0], dict.fromkeys(names, _Bags([], 0))
        placed = list(zip(self.features, self.chosen, strict=True))
        ids = np.concatenate([part.ids[:, at] for part, at in placed], axis=1)
        found |= {name: _Bags([row], 1) for name, row in zip(first.single, ids, strict=True) if name in found}
        for name in first.multi.keys() & found.keys():
            bags = [part.multi[name].select(at) for part, at in placed]
            alone = all(part.multi[name].offsets is None for part in self.features)
            lengths = 1 if alone else np.concatenate([sizes for _, sizes in bags])
            found[name] = _Bags([values for values, _ in bags], lengths)
        return found


class _Bags(NamedTuple):
    """Bags of one side: their ids, in pieces; how many ids each bag has, one number where it is the same."""

    ids: Sequence[Ids]
    lengths: Ints | int

    def longest(self, total: int) -> int:
        """Most ids of a bag, of `total` bags."""
        return int(np.max(self.lengths)) if total else 0

    def encoded(self, encoder: Encoder) -> dict[str, _Bags]:
        """What an encoder makes of codes of numbers, by part; a bag without a code stays empty."""
        codes = np.concatenate([np.zeros(0, np.int64), *self.ids], dtype=np.int64)
        found = {}
        for suffix, bags in encoder.encode(codes).items():
            lengths: Ints | int = 1 if bags.offsets is None else bags.lengths
            if not isinstance(self.lengths, int):
                spread = self.lengths.copy()
                spread[self.lengths > 0] = lengths
                lengths = spread
            found[suffix] = _Bags([bags.values], lengths if self.ids else 0)
        return found


def _jagged(
    infos: Mapping[str, FeatureInfo], sides: Sequence[_Side], ready: Mapping[str, Bags] | None = None
) -> tuple[KeyedJaggedTensor, tuple[int, ...]]:
    """Key by key, all of one side, then all of the next; a side without the feature has empty bags.

    The keys are the features that tables have: a number becomes the parts of its encoder, here and no sooner,
    so that what is read ahead holds one integer a number. Also the most ids of a bag, of each key.

    Args:
        ready: bags of the last side, of features that no row group has.
    """
    columns, keyed = [side.columns(infos) for side in sides], dict[str, list[_Bags]]()
    for name, info in infos.items():
        of_sides = [each[name] for each in columns]
        if info.encoder is None:
            keyed[name] = of_sides
            continue
        for parts in [bags.encoded(info.encoder) for bags in of_sides]:
            for suffix, bags in parts.items():
                keyed.setdefault(f"{name}{suffix}", []).append(bags)
    for name, given in (ready or {}).items():
        lengths_of = 1 if given.offsets is None else given.lengths
        keyed[name] = [*[_Bags([], 0)] * (len(sides) - 1), _Bags([given.values], lengths_of)]
    stride = sum(side.total for side in sides)
    lengths = np.ones(len(keyed) * stride, dtype=np.int32)
    begin, held, most, values = 0, [], [], list[Ids]()
    for of_sides in keyed.values():
        before = len(values)
        for bags, side in zip(of_sides, sides, strict=True):
            values += bags.ids
            lengths[begin : begin + side.total] = bags.lengths
            begin += side.total
        held.append(sum(part.size for part in values[before:]))
        most.append(max(bags.longest(side.total) for bags, side in zip(of_sides, sides, strict=True)))
    kjt = KeyedJaggedTensor(
        keys=list(keyed),
        values=torch.from_numpy(np.concatenate(values, dtype=np.int64)),
        lengths=torch.from_numpy(lengths),
        stride=stride,
        # TorchRec would ask the device for it, in each collection.
        length_per_key=held,
    )
    return kjt, tuple(most)


def _tensor(parts: Sequence[npt.NDArray[np.generic]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts))
