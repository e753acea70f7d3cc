"""`lfu`: the id that was seen least goes first, and among equals the one whose newest event is oldest."""

from __future__ import annotations

import numpy as np

from embeddings.ids.eviction.eviction import Int64s
from embeddings.ids.rules import IdRules

# A score holds seconds until the year 2514 in its low bits, and uses, of which more count the same, above.
_TIME_BITS = 34
_MOST_TIME = (1 << _TIME_BITS) - 1
_MOST_USES = (1 << (63 - _TIME_BITS)) - 2


class LeastFrequent:
    """Counts the sightings since the id got its row."""

    def __init__(self, rules: IdRules) -> None:
        pass

    def seen(self, uses: Int64s, before: Int64s, last: Int64s, counts: Int64s) -> Int64s:
        return uses + counts

    def scores(self, uses: Int64s, last: Int64s, now: int) -> Int64s:
        return by_uses(uses, last)


def by_uses(uses: Int64s, last: Int64s) -> Int64s:
    """Scores that order by uses, and equal ones by time."""
    scores: Int64s = (np.minimum(uses, _MOST_USES) << _TIME_BITS) | np.clip(last, 0, _MOST_TIME)
    return scores
