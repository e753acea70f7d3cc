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
from trainer.data.rows import PlanRows, UserRows
from trainer.log.bags import Ints


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


# How many ranks decode a row group follows from how many blocks of a step a rank has on average, and from how
# many row groups of a place. With one rank each, chance gives the fullest of 64 ranks 1.4 to 2.9 times the
# mean; with a choice for each block 1.1 at most. Measured with histories of 1 to 20,000 behaviors
# (benchmarks/ranks.py).
_CHOICE, _GROUPS = 32, 3
# One rank each is enough where so many row groups a rank are dealt, and where chance gives none more than the
# mean and this: of W ranks that draw n blocks each on average, sqrt(2 ln W / n) or so at most. Few ranks may
# be less even: with a second rank for each row group nearly all would decode all.
_EACH, _UNEVEN, _UNEVEN_FEW, _FEW = 4, 0.1, 0.25, 3
# Blocks that change their rank in a step at most, for each rank.
_MOVES = 8


class Block(NamedTuple):
    """A planned block; its data is decoded only where and when it is needed.

    Attributes:
        owners: the ranks that decode its row group; none: every rank does.
        first, last: requests [first, last) of the row group.
        behaviors: planned length of its history (an ingestion delay may shorten it).
        candidates: of all its requests.
        rows: its row group.
    """

    owners: tuple[int, ...]
    first: int
    last: int
    behaviors: int
    candidates: int
    rows: LazyRows

    @property
    def cost(self) -> int:
        """What balances ranks: bags looked up."""
        return self.behaviors + self.candidates


def cut_blocks(plan: PlanRows, owners: tuple[int, ...], rows: LazyRows, config: DataConfig) -> list[Block]:
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
    return list(map(Block._make, zip(repeat(owners), *parts, repeat(rows))))


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


def deal(costs: Sequence[int], world_size: int, owners: Sequence[tuple[int, ...]] = ()) -> list[int]:
    """Which rank takes what: the costliest goes to the least loaded rank. Deterministic.

    Args:
        owners: the ranks that may take each; none given, or none for one: any rank.
    """
    if world_size == 1:
        return [0] * len(costs)
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    if any(owners):
        return _deal_among(costs, world_size, [among or range(world_size) for among in owners], order)
    taken = [0] * len(costs)
    heap = [(0, rank) for rank in range(world_size)]
    for index in order:
        load, rank = heapq.heappop(heap)
        taken[index] = rank
        heapq.heappush(heap, (load + costs[index], rank))
    return taken


def _deal_among(
    costs: Sequence[int], world_size: int, owners: Sequence[Sequence[int]], order: Sequence[int]
) -> list[int]:
    """As `deal`; then the fullest rank hands on what makes no other as full, as long as it can."""
    taken, loads = [0] * len(costs), [0] * world_size
    by_rank: list[list[int]] = [[] for _ in range(world_size)]
    for index in order:
        rank = min(owners[index], key=loads.__getitem__)
        taken[index] = rank
        loads[rank] += costs[index]
        by_rank[rank].append(index)
    for _ in range(_MOVES * world_size):
        fullest = max(range(world_size), key=loads.__getitem__)
        best, move = loads[fullest], None
        for index in by_rank[fullest]:
            other = min(
                (rank for rank in owners[index] if rank != fullest), key=loads.__getitem__, default=fullest
            )
            after = max(loads[fullest] - costs[index], loads[other] + costs[index])
            if other != fullest and after < best:
                best, move = after, (index, other)
        if move is None:
            break
        index, other = move
        by_rank[fullest].remove(index)
        by_rank[other].append(index)
        taken[index] = other
        loads[fullest] -= costs[index]
        loads[other] += costs[index]
    return taken


def decoders_of(costs: Sequence[int], world_size: int, each: int) -> list[tuple[int, ...]]:
    """The ranks that decode each row group of a place: one to which it is dealt by cost, and others.

    Args:
        each: how many ranks for a row group.
    """
    others = world_size - 1
    each = min(each, world_size)
    stride = max(1, others // max(each, 1))
    return [
        (owner, *((owner + 1 + (number + place * stride) % others) % world_size for place in range(each - 1)))
        for number, owner in enumerate(deal(costs, world_size))
    ]


def decoders_needed(blocks: Sequence[Block], config: DataConfig, world_size: int) -> int:
    """How many ranks should decode each row group, so that steps of a place's blocks are even; 0: all."""
    if not blocks:
        return 0
    steps = sum(block.candidates for block in blocks) / config.batch_candidates
    if config.batch_behaviors:
        steps = max(steps, sum(block.behaviors for block in blocks) / config.batch_behaviors)
    # Fewer blocks than one step takes are all of it.
    each = len(blocks) / max(steps, 1) / world_size
    groups = len({id(block.rows) for block in blocks})
    chance = math.sqrt(2 * math.log(world_size) / each)
    if groups >= _EACH * world_size and chance <= (_UNEVEN if world_size > _FEW else _UNEVEN_FEW):
        return 1
    # And every rank has some row groups to take blocks from.
    needed = 1 + math.ceil(max(_CHOICE / each, _GROUPS * world_size / groups))
    return needed if needed <= most_decoders(world_size) else 0


def most_decoders(world_size: int) -> int:
    """The most ranks that share a row group, unless all do."""
    return (world_size + 1) // 2
