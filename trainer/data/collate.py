"""Laying blocks end to end in a RequestBatch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.jagged import one_id_bags
from trainer.config import DataConfig
from trainer.data.batch import RequestBatch, Retrieval
from trainer.data.blocks import Block, visible_ends
from trainer.data.hard_search import hierarchical_search
from trainer.data.rows import Bags, Columns, Ints, UserRows
from trainer.data.schema import FeatureInfo

_DAY = 86_400.0


@dataclass(frozen=True)
class Piece:
    """One block's data, ready to be laid beside others.

    Attributes:
        history: feature -> bags of its n behaviors; time: [n].
        start, end: [r], windows among those n behaviors.
        index, level, rank: [c, B] of a hard search (see `Retrieval`), else None.
        counts: [c, x], match counts of the search.
    """

    rows: UserRows
    block: Block
    history: Mapping[str, Bags]
    time: Ints
    start: Ints
    end: Ints
    index: Ints | None = None
    level: Ints | None = None
    rank: Ints | None = None
    counts: npt.NDArray[np.float32] | None = None

    @property
    def requests(self) -> slice:
        return slice(self.block.first, self.block.last)

    @cached_property
    def candidates(self) -> slice:
        offsets = self.rows.candidate_offsets
        return slice(int(offsets[self.block.first]), int(offsets[self.block.last]))

    @property
    def candidate_counts(self) -> Ints:
        return np.diff(self.rows.candidate_offsets[self.block.first : self.block.last + 1])


def collate(
    blocks: Sequence[Block], config: DataConfig, columns: Columns, step_candidates: int
) -> RequestBatch:
    """At least one block as a batch; `step_candidates` counts the candidates of all ranks."""
    pieces = [_piece(block, config, columns) for block in blocks]
    base = np.cumsum([0, *(piece.time.size for piece in pieces)])[:-1]
    counts = np.concatenate([piece.candidate_counts for piece in pieces])
    return RequestBatch(
        features=_features(pieces, columns.features),
        behavior_time=_tensor([piece.time for piece in pieces]),
        request_time=_tensor([piece.rows.request_time[piece.requests] for piece in pieces]),
        window_start=_tensor([piece.start + at for piece, at in zip(pieces, base, strict=True)]),
        window_end=_tensor([piece.end + at for piece, at in zip(pieces, base, strict=True)]),
        user_id=_tensor([np.full(p.end.size, p.rows.user_id[p.block.row]) for p in pieces]),
        request_id=_tensor([piece.rows.request_id[piece.requests] for piece in pieces]),
        candidate_request=torch.from_numpy(np.repeat(np.arange(counts.size), counts)),
        labels=_tensor([piece.rows.labels[piece.candidates] for piece in pieces]),
        weight=_tensor([piece.rows.weight[piece.candidates] for piece in pieces]),
        numeric=torch.cat([_numeric(pieces), _counts(pieces)], dim=1),
        context=_context(pieces, columns.context),
        retrieval=_retrieval(pieces, base) if config.search.levels else None,
        step_candidates=step_candidates,
    )


def _piece(block: Block, config: DataConfig, columns: Columns) -> Piece:
    rows = block.rows()
    ends = visible_ends(rows, block.row, block.first, block.last, config.ingestion_delay)
    starts = np.maximum(ends - config.history_length, 0)
    # With an ingestion delay windows lie earlier than planned.
    low, high = int(starts.min()), int(ends.max())
    base = int(rows.history_offsets[block.row])
    begin, end = base + low, base + high
    history = {name: bags.part(begin, end) for name, bags in rows.history.items()}
    piece = Piece(rows, block, history, rows.history_time[begin:end], starts - low, ends - low)
    return _searched(piece, config, columns) if config.search.levels else piece


def _searched(piece: Piece, config: DataConfig, columns: Columns) -> Piece:
    """Keep only the behaviors that the hard search retrieves for some candidate of the block."""
    search = config.search
    span = piece.candidates
    found = hierarchical_search(
        np.stack([piece.history[level].values for level in search.levels]),
        piece.time,
        np.stack([piece.rows.candidates[level].values[span] for level in search.levels]),
        np.repeat(np.arange(piece.end.size), piece.candidate_counts),
        piece.start,
        piece.end,
        piece.rows.request_time[piece.requests],
        search.budget,
        search.half_life_days * _DAY,
        piece.history[search.domain].values if search.domain else None,
        search.domain_minimum or None,
    )
    kept = np.unique(found.index[found.index >= 0])
    place = np.searchsorted(kept, found.index.clip(min=0))
    owner_end = np.repeat(piece.end, piece.candidate_counts)
    counts = np.concatenate([found.matches, found.decayed], axis=1).astype(np.float32)
    return Piece(
        piece.rows,
        piece.block,
        {name: bags.take(kept) for name, bags in piece.history.items()},
        piece.time[kept],
        np.searchsorted(kept, piece.start),
        np.searchsorted(kept, piece.end),
        np.where(found.index >= 0, place, -1),
        found.level.astype(np.int64),
        np.where(found.index >= 0, owner_end[:, None] - found.index, 0),
        counts if search.counts else counts[:, :0],
    )


def _features(pieces: Sequence[Piece], infos: Mapping[str, FeatureInfo]) -> KeyedJaggedTensor:
    """Behaviors of all pieces, then candidates of all pieces, key by key; a missing side has empty bags."""
    parts: list[tuple[Bags | None, int]] = []
    for name, info in infos.items():
        parts += [(p.history[name] if info.of_behaviors else None, p.time.size) for p in pieces]
        for piece in pieces:
            span = piece.candidates
            bags = piece.rows.candidates[name].part(span.start, span.stop) if info.of_candidates else None
            parts.append((bags, span.stop - span.start))
    stride = sum(piece.time.size + piece.block.candidates for piece in pieces)
    return _jagged(list(infos), parts, stride)


def _context(pieces: Sequence[Piece], infos: Mapping[str, FeatureInfo]) -> KeyedJaggedTensor | None:
    if not infos:
        return None
    parts: list[tuple[Bags | None, int]] = [
        (piece.rows.context[name].part(piece.block.first, piece.block.last), piece.end.size)
        for name in infos
        for piece in pieces
    ]
    return _jagged(list(infos), parts, sum(piece.end.size for piece in pieces))


def _jagged(keys: list[str], parts: list[tuple[Bags | None, int]], stride: int) -> KeyedJaggedTensor:
    values = np.concatenate([bags.values for bags, _ in parts if bags is not None])
    if all(bags is not None and bags.offsets is None for bags, _ in parts):
        return one_id_bags(keys, torch.from_numpy(values).view(len(keys), stride))
    lengths = [np.zeros(n, dtype=np.int32) if bags is None else bags.lengths(n) for bags, n in parts]
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.from_numpy(values),
        lengths=torch.from_numpy(np.concatenate(lengths)),
        stride=stride,
    )


def _numeric(pieces: Sequence[Piece]) -> torch.Tensor:
    return _tensor([piece.rows.numeric[piece.candidates] for piece in pieces])


def _counts(pieces: Sequence[Piece]) -> torch.Tensor:
    """[C, 0] without a hard search, or where its counts are not wanted."""
    none = np.zeros((0, 0), dtype=np.float32)
    return _tensor(
        [
            none.reshape(piece.block.candidates, 0) if piece.counts is None else piece.counts
            for piece in pieces
        ]
    )


def _retrieval(pieces: Sequence[Piece], base: Ints) -> Retrieval:
    index = [
        np.where(p.index >= 0, p.index + at, -1)
        for p, at in zip(pieces, base, strict=True)
        if p.index is not None
    ]
    return Retrieval(
        index=_tensor(index),
        level=_tensor([p.level for p in pieces if p.level is not None]),
        rank=_tensor([p.rank for p in pieces if p.rank is not None]),
    )


def _tensor(parts: Sequence[npt.NDArray[np.generic]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts))
