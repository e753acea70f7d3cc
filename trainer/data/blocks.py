"""Cutting user rows into blocks: consecutive requests of one user that share one stretch of history."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from trainer.data.rows import Ints, PlanRows, UserRows


@dataclass(frozen=True)
class Block:
    """A planned block; its data is decoded only where and when it is needed.

    Attributes:
        place: which row group of the window; row: the user's row in it.
        first, last: requests [first, last) of the row group.
        begin, end: behaviors [begin, end) of the user's history.
        candidates: of all its requests.
        rows: decodes the row group (once; see `trainer.data.reader`).
    """

    place: int
    row: int
    first: int
    last: int
    begin: int
    end: int
    candidates: int
    rows: Callable[[], UserRows]

    @property
    def behaviors(self) -> int:
        return self.end - self.begin

    @property
    def cost(self) -> int:
        """What balances ranks: bags looked up."""
        return self.behaviors + self.candidates


@dataclass(frozen=True)
class BlockLimits:
    """How blocks are cut.

    Attributes:
        history_length: L of a request's window.
        requests: most requests of a block.
        behaviors: a block is closed before a request that would stretch its history beyond this
            (one window is always allowed).
    """

    history_length: int
    requests: int
    behaviors: int


def cut_blocks(
    plan: PlanRows, place: int, rows: Callable[[], UserRows], limits: BlockLimits
) -> Iterator[Block]:
    """All requests of a row group as blocks, in stored order; requests without candidates are left out."""
    counted = np.r_[0, np.cumsum(plan.candidates)]
    ends, length = plan.history_end.tolist(), limits.history_length
    for row in range(plan.request_offsets.size - 1):
        request, stop = int(plan.request_offsets[row]), int(plan.request_offsets[row + 1])
        while request < stop:
            begin, end = max(0, ends[request] - length), ends[request]
            last = request + 1
            while last < stop and last - request < limits.requests:
                low, high = min(begin, max(0, ends[last] - length)), max(end, ends[last])
                if high - low > limits.behaviors:
                    break
                begin, end, last = low, high, last + 1
            candidates = int(counted[last] - counted[request])
            if candidates:
                yield Block(place, row, request, last, begin, end, candidates, rows)
            request = last


def visible_ends(rows: UserRows, row: int, first: int, last: int, delay: int) -> Ints:
    """Where the visible history of requests [first, last) ends, counted from the row's first behavior.

    A behavior is visible if it is older than the request's time less the ingestion delay.
    """
    ends = rows.history_end[first:last]
    if delay == 0:
        return ends
    start, stop = int(rows.history_offsets[row]), int(rows.history_offsets[row + 1])
    limit = rows.request_time[first:last] - delay
    return np.minimum(ends, np.searchsorted(rows.history_time[start:stop], limit, side="left"))
