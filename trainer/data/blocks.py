"""Blocks: consecutive requests of one user that share one stretch of history.

They are cut from user rows and dealt to the ranks of a step.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import NamedTuple

import numpy as np

from trainer.config.sections import DataConfig
from trainer.data.files import RowGroup
from trainer.data.row_group import Ints
from trainer.data.rows import PlanRows, UserRows


@dataclass(frozen=True)
class WindowedRows:
    """A decoded row group, with what every request of it may see.

    Attributes:
        rows: the row group.
        requests: int64 [7, requests]: user id, request id, time, behaviors [start, end) of its window,
            candidates [start, end); both count from the row group's first.
    """

    rows: UserRows
    requests: Ints


@dataclass(frozen=True)
class Selection:
    """The behaviors of one block's history that a batch holds.

    Attributes:
        kept: [n], ascending, counted from the row group's first behavior.
        start, end: [r], each request's window among those n.
    """

    kept: Ints
    start: Ints
    end: Ints

    @staticmethod
    def of(history: slice, kept: Ints, start: Ints, end: Ints) -> Selection:
        """`kept` and the windows [start, end) count from the first behavior of the block's `history`."""
        return Selection(history.start + kept, np.searchsorted(kept, start), np.searchsorted(kept, end))


def newest_behaviors(start: Ints, end: Ints, count: int) -> Ints:
    """The newest `count` behaviors of each window [start, end), ascending, each once."""
    newest = np.zeros(int(end.max()), dtype=bool)
    for first, last in zip(np.maximum(start, end - count).tolist(), end.tolist(), strict=True):
        newest[first:last] = True
    return np.nonzero(newest)[0]


class LazyRows:
    """A row group that is decoded once: ahead in a pool if started, else when first called."""

    def __init__(self, place: RowGroup, decode: Callable[[], WindowedRows]) -> None:
        self.place, self._decode = place, decode
        self._ahead: Future[WindowedRows] | None = None
        self._rows: WindowedRows | None = None

    def start(self, pool: Executor) -> None:
        self._ahead = pool.submit(self._decode)

    def __call__(self) -> WindowedRows:
        """The rows; raises what decoding raised."""
        if self._rows is None:
            self._rows = self._ahead.result() if self._ahead is not None else self._decode()
        return self._rows


# `data.sharding = "auto"` decodes a window of row groups apart where no rank has so many times its share of
# it, and where chance leaves no rank with so much of a step: of W ranks that draw n blocks each on average,
# the fullest has about sqrt(2 ln W / n) more, at most.
_UNEVEN = 1.25
# The owner of a row group that every rank decodes.
ANYONE = -1


class Block(NamedTuple):
    """A planned block; its data is decoded only where and when it is needed.

    Attributes:
        owner: the rank that decodes its row group, or ANYONE where every rank does.
        first, last: requests [first, last) of the row group.
        behaviors: planned length of its history (an ingestion delay may shorten it).
        candidates: of all its requests.
        rows: its row group.
    """

    owner: int
    first: int
    last: int
    behaviors: int
    candidates: int
    rows: LazyRows

    @property
    def cost(self) -> int:
        """What balances ranks: bags looked up."""
        return self.behaviors + self.candidates


def cut_blocks(plan: PlanRows, owner: int, rows: LazyRows, config: DataConfig) -> list[Block]:
    """All requests of a row group as blocks, in stored order; requests without candidates are left out.

    A block is closed before a request that would stretch its history beyond `config.block_limit`; one window
    is always allowed.
    """
    if not plan.history_end.size:
        return []
    starts = np.maximum(plan.history_end - config.history_length, 0)
    first = _first_requests(plan, starts, config)
    last = np.append(first[1:], plan.history_end.size)
    behaviors = np.maximum.reduceat(plan.history_end, first) - np.minimum.reduceat(starts, first)
    candidates = np.add.reduceat(plan.candidates, first)
    parts = (part[candidates > 0].tolist() for part in (first, last, behaviors, candidates))
    return list(map(Block._make, zip(repeat(owner), *parts, repeat(rows))))


def _first_requests(plan: PlanRows, starts: Ints, config: DataConfig) -> Ints:
    """The first request of every block, ascending."""
    ends, requests = plan.history_end, np.arange(starts.size)
    user = np.repeat(np.arange(plan.request_offsets.size - 1), np.diff(plan.request_offsets))
    # Where the next block begins at the latest.
    latest = np.minimum(plan.request_offsets[user + 1], requests + config.requests_per_block)
    if ((ends[1:] >= ends[:-1]) | (user[1:] != user[:-1])).all():
        # Windows only move forward, as in requests by time: the first to end too far away closes a block.
        # With the user as the upper part of the key one search serves all users.
        most = int(ends.max())
        reach = np.minimum(starts + config.block_limit, most)
        too_far = np.searchsorted(user * (most + 1) + ends, user * (most + 1) + reach, side="right")
        following = np.clip(too_far, requests + 1, latest).tolist()
        return _chain(following.__getitem__, starts.size)
    low, high, stop, limit = starts.tolist(), ends.tolist(), latest.tolist(), config.block_limit

    def next_block(request: int) -> int:
        begin, end, last = low[request], high[request], request + 1
        while last < stop[request]:
            begin, end = min(begin, low[last]), max(end, high[last])
            if end - begin > limit:
                break
            last += 1
        return last

    return _chain(next_block, starts.size)


def _chain(following: Callable[[int], int], stop: int) -> Ints:
    firsts, at = [], 0
    while at < stop:
        firsts.append(at)
        at = following(at)
    return np.array(firsts, dtype=np.int64)


def with_windows(rows: UserRows, history_length: int, delay: int) -> WindowedRows:
    """Windows of `history_length` behaviors, ending where the ingestion delay (seconds) says."""
    counts = np.diff(rows.request_offsets)
    ends = rows.history_end
    if delay:
        # A behavior is visible if it is older than the request's time less the delay.
        limit, ends = rows.request_time - delay, ends.copy()
        offsets = rows.request_offsets.tolist(), rows.history_offsets.tolist()
        for (first, last), (oldest, stop) in zip(*map(pairwise, offsets), strict=True):
            older = np.searchsorted(rows.history_time[oldest:stop], limit[first:last], side="left")
            ends[first:last] = np.minimum(ends[first:last], older)
    base = np.repeat(rows.history_offsets[:-1], counts)
    start, end = base + np.maximum(ends - history_length, 0), base + ends
    user, candidates = np.repeat(rows.user_id, counts), rows.candidate_offsets
    requests = (user, rows.request_id, rows.request_time, start, end, candidates[:-1], candidates[1:])
    return WindowedRows(rows, np.stack(requests))


def deal(costs: Sequence[int], world_size: int, owners: Sequence[int] = ()) -> list[int]:
    """Which rank takes what: the costliest goes to the least loaded rank. Deterministic.

    Args:
        owners: the rank that must take each, or ANYONE; none given: anyone may take all.
    """
    if world_size == 1:
        return [0] * len(costs)
    owner = list(owners) or [ANYONE] * len(costs)
    loads = [0] * world_size
    for cost, rank in zip(costs, owner, strict=True):
        if rank != ANYONE:
            loads[rank] += cost
    heap = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    free = [index for index, rank in enumerate(owner) if rank == ANYONE]
    for index in sorted(free, key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(heap)
        owner[index] = rank
        heapq.heappush(heap, (load + costs[index], rank))
    return owner


def spreads_evenly(blocks: Sequence[Block], config: DataConfig, world_size: int) -> bool:
    """Whether the blocks of a window, each with its owner, keep all ranks about equally busy in each step."""
    if not blocks:
        return True
    loads = [0] * world_size
    for block in blocks:
        loads[block.owner] += block.cost
    steps = sum(block.candidates for block in blocks) / config.batch_candidates
    if config.batch_behaviors:
        steps = max(steps, sum(block.behaviors for block in blocks) / config.batch_behaviors)
    # Fewer blocks than one step takes are all of it.
    each = len(blocks) / max(steps, 1) / world_size
    chance = math.sqrt(2 * math.log(world_size) / each)
    return max(loads) * world_size <= _UNEVEN * sum(loads) and 1 + chance <= _UNEVEN
