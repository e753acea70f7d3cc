"""How fast the model scores, measured while it does."""

from __future__ import annotations

import math

# A measurement counts half once it is so old, so that a call which took long by accident is soon forgotten,
# also where few others follow.
_HALF_LIFE = 2.0
# Older measurements say nothing. Where the model has nothing to do, they soon say nothing: it may have been
# slow because its tables were read from a disk, or because the machine stood still, and who is refused for it
# brings no new measurement.
_VALID_SECONDS, _VALID_IDLE_SECONDS = 30.0, 1.0


class Pace:
    """The mean rate of the newest model calls, each weighted by how long it took and by its age."""

    def __init__(self) -> None:
        self._work = self._seconds = 0.0
        self._noted = -math.inf

    def note(self, work: int, seconds: float, now: float) -> None:
        """Count a model call that has ended `now`; for `work` see `trainer.serving.cost`."""
        kept = 0.5 ** ((now - self._noted) / _HALF_LIFE)
        self._work, self._seconds = kept * self._work + work, kept * self._seconds + seconds
        self._noted = now

    def seconds(self, work: int, now: float, busy: bool = False) -> float:
        """How long so much work takes; 0 where nobody knows, so that nothing is refused for it.

        Args:
            busy: whether the model has work, which is measured.
        """
        valid = _VALID_SECONDS if busy else _VALID_IDLE_SECONDS
        return work * self._seconds / self._work if now - self._noted <= valid else 0.0
