"""`lfu_decay`: as `lfu`, where sightings count half after every half-life of event time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from embeddings.ids.eviction.eviction import Int64s
from embeddings.ids.eviction.lfu import by_uses
from embeddings.ids.rules import IdRules

# All bits of a number but its sign.
_ALL_BITS = 63


class DecayingFrequency:
    """Event time is cut into half-lives. Uses are halved, and rounded down, where one of them ends."""

    def __init__(self, rules: IdRules) -> None:
        self._half_life = rules.half_life

    def seen(self, uses: Int64s, before: Int64s, last: Int64s, counts: Int64s) -> Int64s:
        return self._faded(uses, before, last) + counts

    def scores(self, uses: Int64s, last: Int64s, now: int) -> Int64s:
        return by_uses(self._faded(uses, last, np.int64(now)), last)

    def _faded(self, uses: Int64s, before: Int64s, now: Int64s | np.int64) -> Int64s:
        """Uses of times before as they count now."""
        ended: npt.NDArray[np.int64] = now // self._half_life - before // self._half_life
        return uses >> np.clip(ended, 0, _ALL_BITS)
