"""How fast the model scores, measured while it does."""

from __future__ import annotations

import math

# A measurement counts half once so much further time of the model was measured.
_HALF_LIFE = 2.0
# Older measurements say nothing: the model may have been slow because its tables were read from a disk.
_VALID_SECONDS = 30.0


class Pace:
    """The mean rate of the newest model calls, each weighted by how long it took."""

    def __init__(self) -> None:
        self._work = self._seconds = 0.0
        self._noted = -math.inf

    def note(self, work: int, seconds: float, now: float) -> None:
        """Count a model call that has ended `now`; for `work` see `trainer.serving.cost`."""
        kept = 0.5 ** (seconds / _HALF_LIFE) if self.is_known(now) else 0.0
        self._work, self._seconds = kept * self._work + work, kept * self._seconds + seconds
        self._noted = now

    def is_known(self, now: float) -> bool:
        """Whether anything was measured lately."""
        return now - self._noted <= _VALID_SECONDS

    def seconds(self, work: int, now: float) -> float:
        """How long so much work takes; 0 where nobody knows, so that nothing is refused for it."""
        return work * self._seconds / self._work if self.is_known(now) else 0.0
