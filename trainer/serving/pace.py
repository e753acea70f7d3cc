"""How fast the model scores, measured while it does."""

from __future__ import annotations

import math

# A measurement counts half after so much further work was measured, in seconds of the model.
_HALF_LIFE = 2.0
# Older measurements say nothing: the model may have been slow because its tables were read from a disk.
_VALID_SECONDS = 30.0


class Pace:
    """The mean rate of the newest model calls, each weighted by how long it took."""

    def __init__(self) -> None:
        self._cost = self._seconds = 0.0
        self._noted = -math.inf

    def note(self, cost: int, seconds: float, now: float) -> None:
        """Count a model call that has ended `now`."""
        kept = 0.5 ** (seconds / _HALF_LIFE)
        if now - self._noted > _VALID_SECONDS:
            kept = 0.0
        self._cost, self._seconds = kept * self._cost + cost, kept * self._seconds + seconds
        self._noted = now

    def seconds(self, cost: float, now: float) -> float | None:
        """How long this much work takes; None: nobody knows, since nothing was measured lately."""
        if not self._cost or now - self._noted > _VALID_SECONDS:
            return None
        return cost * self._seconds / self._cost
