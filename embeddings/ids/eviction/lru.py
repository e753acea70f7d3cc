"""`lru`: the id whose newest event is oldest goes first."""

from __future__ import annotations

import numpy as np

from embeddings.ids.eviction.eviction import Int64s
from embeddings.ids.rules import IdRules


class LeastRecent:
    """By event time: a behavior of last year does not make its item new, however often it is read."""

    def __init__(self, rules: IdRules) -> None:
        pass

    def seen(self, uses: Int64s, before: Int64s, last: Int64s, counts: Int64s) -> Int64s:
        return uses + counts

    def scores(self, uses: Int64s, last: Int64s, now: int) -> Int64s:
        return np.maximum(last, 0)
