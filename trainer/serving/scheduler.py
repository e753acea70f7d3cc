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
from typing import Generic, NamedTuple, TypeVar

Owner = TypeVar("Owner")


@dataclass(frozen=True)
class BatchSettings:
    """How requests are put together.

    Attributes:
        window: seconds to wait for company; 0 = whoever came while the model was busy.
        requests, behaviors, candidates, cost: most of one model call (one request is always scored whole);
            for `cost` see `trainer.serving.cost`. A body that came while the model was busy waits that long.
        waiting: bodies that may wait; beyond, they are turned away with 429.
        threads: of the model.
        deadline: seconds that a body has whose client names no deadline; 0 = all the time.
        inline: bytes of a body that is decoded at once and not by the thread that decodes larger ones.
        at_once: seconds of a model call that is done by the event loop and not by the model's thread, where
            the calls before say that it takes no longer; 0 = none is.
    """

    window: float = 0.0
    requests: int = 32
    behaviors: int = 200_000
    candidates: int = 10_000
    cost: int = 16_000_000
    waiting: int = 256
    threads: int = 1
    deadline: float = 30.0
    inline: int = 32 << 10
    at_once: float = 0.004


class Size(NamedTuple):
    """What some requests take of a model call."""

    requests: int
    behaviors: int
    candidates: int
    cost: int

    def plus(self, other: Size) -> Size:
        """Of both together."""
        return Size(
            self.requests + other.requests,
            self.behaviors + other.behaviors,
            self.candidates + other.candidates,
            self.cost + other.cost,
        )

    def fits(self, settings: BatchSettings) -> bool:
        """Whether one model call may have so much."""
        return (
            self.requests <= settings.requests
            and self.behaviors <= settings.behaviors
            and self.candidates <= settings.candidates
            and self.cost <= settings.cost
        )


class BodyPart(NamedTuple):
    """The requests [first, end) of a body, which are scored by one model call."""

    first: int
    end: int
    size: Size


class Work(Generic[Owner]):
    """A body in the scheduler.

    Args:
        owner: what the caller knows the body by.
        kind: only bodies of one kind may share a model call.
        sizes: of each request, one at least.
        queued, deadline: seconds of the scheduler's clock.

    Attributes:
        done: parts that were scored.
    """

    def __init__(
        self,
        owner: Owner,
        kind: Hashable,
        sizes: Sequence[Size],
        settings: BatchSettings,
        queued: float = 0.0,
        deadline: float = math.inf,
    ) -> None:
        self.owner, self.kind, self.queued, self.deadline = owner, kind, queued, deadline
        self.parts = parts_of(sizes, settings)
        self.done = 0
        self._costs = [0, *accumulate(part.size.cost for part in self.parts)]

    @property
    def part(self) -> BodyPart:
        """The next one."""
        return self.parts[self.done]

    @property
    def parts_left(self) -> int:
        """How many parts were not scored yet."""
        return len(self.parts) - self.done

    def requests(self, parts: int) -> int:
        """Of the next so many parts."""
        end = min(self.done + parts, len(self.parts))
        return self.parts[end - 1].end - self.part.first

    def cost(self, parts: int) -> int:
        """Of the next so many parts."""
        return self._costs[min(self.done + parts, len(self.parts))] - self._costs[self.done]


def parts_of(sizes: Sequence[Size], settings: BatchSettings) -> list[BodyPart]:
    """The parts of a body, in order: each has as many requests as one model call may have."""
    parts: list[BodyPart] = []
    for at, size in enumerate(sizes):
        if parts and (together := parts[-1].size.plus(size)).fits(settings):
            parts[-1] = BodyPart(parts[-1].first, at + 1, together)
        else:
            parts.append(BodyPart(at, at + 1, size))
    return parts


class Scheduler(Generic[Owner]):
    """Bodies that wait, in the order of their turns. It knows no clock and no thread.

    The first body always gets its turn, and a body that had one stands behind all that wait then. So a body
    waits for one part of each body before it at most, and nobody waits for ever.

    Attributes:
        settings: of model calls; bodies keep the parts that they came with.
    """

    def __init__(self, settings: BatchSettings) -> None:
        self.settings = settings
        self._ring: deque[Work[Owner]] = deque()
        self._under_way: list[Work[Owner]] = []

    @property
    def waiting(self) -> Sequence[Work[Owner]]:
        """The bodies whose next parts wait, in the order of their turns."""
        return self._ring

    @property
    def under_way(self) -> Sequence[Work[Owner]]:
        """The bodies whose next parts are scored now."""
        return self._under_way

    def left(self) -> tuple[int, int]:
        """Parts that wait, and their cost; of a body whose part is under way, the parts behind that one."""
        works = [*((work, 0) for work in self._ring), *((work, 1) for work in self._under_way)]
        parts = sum(work.parts_left - begun for work, begun in works)
        return parts, sum(work.cost(work.parts_left) - work.cost(begun) for work, begun in works)

    def before(self, new: Work[Owner]) -> tuple[int, int]:
        """Requests and their cost that are scored until all of a new body is, its own among them.

        An estimate: every other body gets as many turns meanwhile as the new one has parts. It is less where
        bodies are scored earlier beside others, and another where bodies come or go.
        """
        turns = len(new.parts)
        works = [new, *self._ring, *self._under_way]
        return sum(work.requests(turns) for work in works), sum(work.cost(turns) for work in works)

    def add(self, new: Work[Owner]) -> None:
        """A new body, behind all others."""
        self._ring.append(new)

    def remove(self, work: Work[Owner]) -> None:
        """A body whose answer nobody waits for: none of its further parts is scored."""
        if work in self._ring:
            self._ring.remove(work)
        if work in self._under_way:
            self._under_way.remove(work)

    def expire(self, now: float) -> list[Work[Owner]]:
        """The bodies that wait, and whose deadline has passed: they are removed."""
        late = [work for work in self._ring if work.deadline <= now]
        for work in late:
            self._ring.remove(work)
        return late

    def begin(self) -> list[Work[Owner]]:
        """The bodies whose next parts are scored by one model call, which is under way from now on.

        The first body brings its next part; behind it, in order, come bodies of its kind of which everything
        that is left fits in.
        """
        if not self._ring:
            return []
        head = self._ring.popleft()
        chosen, size = [head], head.part.size
        if size.requests < self.settings.requests:
            for work in list(self._ring):
                if work.kind != head.kind or work.parts_left > 1:
                    continue
                if (together := size.plus(work.part.size)).fits(self.settings):
                    chosen.append(work)
                    self._ring.remove(work)
                    size = together
        self._under_way = list(chosen)
        return chosen

    def end(self) -> None:
        """The parts under way have been scored; bodies with further ones go behind all that wait now."""
        for work in self._under_way:
            work.done += 1
            if work.parts_left:
                self._ring.append(work)
        self._under_way = []
