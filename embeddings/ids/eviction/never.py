"""`never`: whoever has a row keeps it; new ids of a full bucket share rows."""

from __future__ import annotations

import numpy as np

from embeddings.ids.eviction.eviction import NEVER, Int64s
from embeddings.ids.rules import IdRules


class Never:
    """Makes no room. Rows of ids whose time is over (`ttl`) are free all the same."""

    def __init__(self, rules: IdRules) -> None:
        pass

    def seen(self, uses: Int64s, before: Int64s, last: Int64s, counts: Int64s) -> Int64s:
        return uses + counts

    def scores(self, uses: Int64s, last: Int64s, now: int) -> Int64s:
        return np.full_like(last, NEVER)
