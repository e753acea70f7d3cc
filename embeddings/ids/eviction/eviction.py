"""What every rule of eviction offers."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from embeddings.ids.rules import IdRules

Int64s = npt.NDArray[np.int64]
# The score of a row that is not to be given up.
NEVER = np.iinfo(np.int64).max


class Eviction(Protocol):
    """Says which row of a full bucket goes first. All numbers are integers, so that every machine agrees."""

    def __init__(self, rules: IdRules) -> None: ...

    def seen(self, uses: Int64s, before: Int64s, last: Int64s, counts: Int64s) -> Int64s:
        """New numbers of uses of rows that are seen in a step.

        Args:
            uses: so far; before, last: when each was last seen, until this step and with it.
            counts: its sightings in this step that count.
        """

    def scores(self, uses: Int64s, last: Int64s, now: int) -> Int64s:
        """The row with the lowest goes first, the first of a bucket among equals; from 0 to `NEVER`."""
