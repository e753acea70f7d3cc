"""Which requests are scored by the next model call.

Bodies take turns, one part each. A part is as many requests of one body as one model call may have. Thus a
small body behind a large one waits for the part that is under way, and not for all of it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple


@dataclass(frozen=True)
class BatchSettings:
    """How requests are put together.

    Attributes:
        window: seconds to wait for company; 0 = whoever came while the model was busy.
        requests, behaviors, candidates, cost: most of one model call (one request is always scored whole);
            for `cost` see `trainer.serving.cost`.
        waiting: bodies that may wait; beyond, they are turned away with 429.
        threads: of the model.
        deadline: seconds that a body has whose client names no deadline; 0 = it has all the time.
    """

    window: float = 0.0
    requests: int = 32
    behaviors: int = 200_000
    candidates: int = 10_000
    cost: int = 32_000_000
    waiting: int = 256
    threads: int = 1
    deadline: float = 30.0


class Size(NamedTuple):
    """What some requests take of a model call."""

    requests: int
    behaviors: int
    candidates: int
    cost: int

    def plus(self, other: Size) -> Size:
        """Of both together."""
        return Size(*(one + more for one, more in zip(self, other, strict=True)))

    def fits(self, settings: BatchSettings) -> bool:
        """Whether one model call may have so much."""
        most = Size(settings.requests, settings.behaviors, settings.candidates, settings.cost)
        return all(own <= limit for own, limit in zip(self, most, strict=True))


class BodyPart(NamedTuple):
    """The requests [first, end) of a body, which are scored by one model call."""

    first: int
    end: int
    size: Size


class Work:
    """A body in the scheduler.

    Args:
        body: whatever the caller knows it by.
        kind: only bodies of one kind may share a model call.
        sizes: of each request, one at least.
        queued, deadline: seconds of the scheduler's clock.

    Attributes:
        done: parts that were scored.
    """

    def __init__(
        self,
        body: Any,
        kind: Hashable,
        sizes: Sequence[Size],
        settings: BatchSettings,
        queued: float = 0.0,
        deadline: float = math.inf,
    ) -> None:
        self.body, self.kind, self.queued, self.deadline = body, kind, queued, deadline
        self.parts = parts_of(sizes, settings)
        self.done = 0
        self._costs = [0, *accumulate(part.size.cost for part in self.parts)]

    @property
    def part(self) -> BodyPart:
        """The next one."""
        return self.parts[self.done]

    @property
    def is_last(self) -> bool:
        return self.done + 1 == len(self.parts)

    def cost(self, parts: int | None = None) -> int:
        """Of the next so many parts, or of all that are left."""
        end = len(self.parts) if parts is None else min(self.done + parts, len(self.parts))
        return self._costs[end] - self._costs[self.done]


def parts_of(sizes: Sequence[Size], settings: BatchSettings) -> list[BodyPart]:
    """The parts of a body, in order: each has as many requests as one model call may have."""
    parts: list[BodyPart] = []
    for at, size in enumerate(sizes):
        if parts and (together := parts[-1].size.plus(size)).fits(settings):
            parts[-1] = BodyPart(parts[-1].first, at + 1, together)
        else:
            parts.append(BodyPart(at, at + 1, size))
    return parts


class Scheduler:
    """Bodies that wait, in the order of their turns. It knows no clock and no thread.

    The first body always gets its turn, and a body that had one stands behind all that wait then. So a body
    waits for one part of each body before it at most, and nobody waits for ever.
    """

    def __init__(self, settings: BatchSettings) -> None:
        self.settings = settings
        self._ring: deque[Work] = deque()
        self._under_way: list[Work] = []

    def __len__(self) -> int:
        """Bodies that wait or are scored."""
        return len(self._ring) + len(self._under_way)

    @property
    def works(self) -> list[Work]:
        """All bodies: those under way first."""
        return [*self._under_way, *self._ring]

    @property
    def first(self) -> Work | None:
        """Whose turn is next."""
        return self._ring[0] if self._ring else None

    def cost_before(self, work: Work) -> int:
        """The most that is scored until all parts of a new body are, these included."""
        rounds = len(work.parts)
        under_way = sum(each.cost(1) for each in self._under_way)
        again = sum(each.cost(rounds + 1) - each.cost(1) for each in self._under_way)
        return under_way + again + sum(each.cost(rounds) for each in self._ring) + work.cost()

    def add(self, work: Work) -> None:
        """A new body, behind all others."""
        self._ring.append(work)

    def remove(self, work: Work) -> None:
        """A body whose answer nobody waits for: none of its further parts is scored."""
        for works in (self._ring, self._under_way):
            if work in works:
                works.remove(work)

    def begin(self, now: float) -> list[Work]:
        """The bodies whose next parts are scored by one model call, which is under way from now on.

        Bodies whose deadline has passed are removed first. The first body brings its next part; behind it,
        in order, come bodies of its kind of which everything that is left fits in.
        """
        for work in [each for each in self._ring if each.deadline <= now]:
            self._ring.remove(work)
        if not self._ring:
            return []
        head = self._ring[0]
        chosen, size = [head], head.part.size
        for work in list(self._ring)[1:]:
            if work.kind == head.kind and work.is_last:
                together = size.plus(work.part.size)
                if together.fits(self.settings):
                    chosen.append(work)
                    size = together
        for work in chosen:
            self._ring.remove(work)
        self._under_way = list(chosen)
        return chosen

    def end(self) -> None:
        """The parts under way have been scored; bodies with further ones go behind all that wait now."""
        for work in self._under_way:
            work.done += 1
            if work.done < len(work.parts):
                self._ring.append(work)
        self._under_way = []
