"""Cutting user rows into blocks, and collating blocks into a RequestBatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.jagged import one_id_bags
from trainer.data.batch import RequestBatch
from trainer.data.rows import Ints, UserRows


@dataclass(frozen=True)
class Block:
    """Consecutive requests of one user and the stretch of history that their windows cover.

    Attributes:
        rows: the decoded row group; row: the user's row in it.
        first, last: requests [first, last) of the row group.
        begin, end: behaviors [begin, end) of the row group.
        ends: where each request's window ends, counted like begin and end.
    """

    rows: UserRows
    row: int
    first: int
    last: int
    begin: int
    end: int
    ends: Ints

    @property
    def behaviors(self) -> int:
        return self.end - self.begin

    @property
    def candidates(self) -> int:
        offsets = self.rows.candidate_offsets
        return int(offsets[self.last] - offsets[self.first])

    @property
    def cost(self) -> int:
        """What balances ranks: bags looked up."""
        return self.behaviors + self.candidates


def cut_blocks(
    rows: UserRows, history_length: int, requests_per_block: int, block_limit: int, ingestion_delay: int = 0
) -> list[Block]:
    """All requests of a row group as blocks, in stored order.

    A block is closed after `requests_per_block` requests, or before a request that would stretch its
    history beyond `block_limit` behaviors (one window is always allowed).
    """
    ends = _visible_ends(rows, ingestion_delay)
    blocks = []
    for row in range(rows.user_id.size):
        base = int(rows.history_offsets[row])
        request, stop = int(rows.request_offsets[row]), int(rows.request_offsets[row + 1])
        while request < stop:
            begin = max(base, int(ends[request]) - history_length)
            last, end = request + 1, int(ends[request])
            while last < stop and last - request < requests_per_block:
                low, high = min(begin, max(base, int(ends[last]) - history_length)), max(end, int(ends[last]))
                if high - low > block_limit:
                    break
                begin, end, last = low, high, last + 1
            blocks.append(Block(rows, row, request, last, begin, end, ends[request:last]))
            request = last
    return blocks


def _visible_ends(rows: UserRows, ingestion_delay: int) -> Ints:
    """Where each request's history ends, as an index into the row group's behaviors."""
    owner = np.repeat(np.arange(rows.user_id.size), np.diff(rows.request_offsets))
    ends = rows.history_offsets[owner] + rows.history_end
    if ingestion_delay == 0:
        return ends
    limit = rows.request_time - ingestion_delay
    for request, row in enumerate(owner):
        start = rows.history_offsets[row]
        visible = np.searchsorted(rows.history_time[start : ends[request]], limit[request], side="left")
        ends[request] = start + visible
    return ends


def collate(blocks: Sequence[Block], history_length: int, step_candidates: int) -> RequestBatch:
    """Lay at least one block end to end; `step_candidates` counts the candidates of all ranks."""
    features = list(blocks[0].rows.history)
    base = np.cumsum([0] + [block.behaviors for block in blocks])
    shift = [int(start) - block.begin for start, block in zip(base, blocks, strict=False)]
    ends = np.concatenate([block.ends + move for block, move in zip(blocks, shift, strict=True)])
    floor = np.repeat(
        np.array([_floor(block) + move for block, move in zip(blocks, shift, strict=True)], dtype=np.int64),
        [block.last - block.first for block in blocks],
    )
    counts = np.concatenate([np.diff(b.rows.candidate_offsets[b.first : b.last + 1]) for b in blocks])
    return RequestBatch(
        features=_features(blocks, features),
        behavior_time=_tensor([b.rows.history_time[b.begin : b.end] for b in blocks]),
        request_time=_tensor([b.rows.request_time[b.first : b.last] for b in blocks]),
        window_start=torch.from_numpy(np.maximum(ends - history_length, floor)),
        window_end=torch.from_numpy(ends),
        user_id=torch.from_numpy(
            np.repeat([b.rows.user_id[b.row] for b in blocks], [b.last - b.first for b in blocks])
        ),
        request_id=_tensor([b.rows.request_id[b.first : b.last] for b in blocks]),
        candidate_request=torch.from_numpy(np.repeat(np.arange(counts.size), counts)),
        labels=_tensor([b.rows.labels[slice(*_candidate_range(b))] for b in blocks]),
        step_candidates=step_candidates,
    )


def _floor(block: Block) -> int:
    """The user's first behavior: no window reaches before it."""
    return int(block.rows.history_offsets[block.row])


def _candidate_range(block: Block) -> tuple[int, int]:
    offsets = block.rows.candidate_offsets
    return int(offsets[block.first]), int(offsets[block.last])


def _features(blocks: Sequence[Block], features: list[str]) -> KeyedJaggedTensor:
    ids = []
    for feature in features:
        ids += [block.rows.history[feature][block.begin : block.end] for block in blocks]
        ids += [block.rows.candidates[feature][slice(*_candidate_range(block))] for block in blocks]
    flat = torch.from_numpy(np.concatenate(ids))
    return one_id_bags(features, flat.view(len(features), -1))


def _tensor(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts))
