"""The counter `sketch`: how often ids were seen, about, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from embeddings.ids.hashing import Hashes, hashed
from embeddings.ids.journal import Journal
from embeddings.ids.rules import IdRules, Ids

Int64s = npt.NDArray[np.int64]
_DEPTH = 4


class SketchCounter:
    """A count-min sketch with conservative update (Estan and Varghese 2002), one for each bucket.

    A bucket has 4 rows of w = `sketch_cells` / buckets cells, rounded up, of 16 bits. An id has a cell in
    each row, and its estimate is the smallest of the four. Seen n times more, its estimate grows by n, up to
    k = `admit_count`, and its cells grow to that where they were less. When a bucket's estimates have grown
    by more than w (k - 1) / 2 together, this number and its cells are halved: ids seen long ago are
    forgotten.

    The error: since the last halving, no id is counted too few times. A cell holds (k - 1) / 2 of others' on
    average at most, so it holds k - 1 or more with a probability of at most 1/2 (Markov), and all four of an
    id do with 1/16 at most. So at most 1/16 of the ids that are seen once get a row, when the sketch is at
    its fullest; for k = 2 it is (1 - e^(-1/2))^4 = 2.4 %.

    An id that was admitted is not forgotten at once: if it loses its row, it may have it again sooner.
    """

    def __init__(self, rules: IdRules, buckets: range) -> None:
        self._rules, self._buckets, self._enough = rules, buckets, rules.admit_count
        self._width = -(-rules.sketch_cells // rules.buckets)
        self._most = self._width * (self._enough - 1) // 2
        self._cells = np.zeros((len(buckets), _DEPTH * self._width), dtype=np.uint16)
        self._sums = np.zeros(len(buckets), dtype=np.int64)

    def admit(
        self, ids: Ids, hashes: Hashes, counts: Int64s, step: int, journal: Journal | None
    ) -> npt.NDArray[np.bool_]:
        """Those that are seen in this step, and were seen often enough with it."""
        admitted = np.zeros(ids.size, dtype=np.bool_)
        seen = np.flatnonzero(counts > 0)
        if not seen.size:
            return admitted
        bucket = self._rules.bucket(hashes[seen]) - self._buckets.start
        cells = bucket[:, None] * self._cells.shape[1] + self._places(hashes[seen])
        flat = self._cells.reshape(-1)
        before = flat[cells].min(1).astype(np.int64)
        # All of a step are added to what was there before it, so that their order says nothing.
        after = np.minimum(before + counts[seen], np.maximum(before, self._enough))
        admitted[seen] = after >= self._enough
        touched, which = np.unique(bucket, return_inverse=True)
        if journal is not None:
            journal.note(flat, np.unique(cells))
            journal.note(self._sums, touched)
        np.maximum.at(flat, cells.ravel(), after.repeat(_DEPTH).astype(np.uint16))
        self._sums[touched] += np.bincount(which, after - before, touched.size).astype(np.int64)
        self._halve(touched[self._sums[touched] > self._most], journal)
        return admitted

    def state(self) -> dict[str, npt.NDArray[Any]]:
        return {"cells": self._cells, "sums": self._sums}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        self._cells[...] = state.get("cells", 0)
        self._sums[...] = state.get("sums", 0)

    def _places(self, hashes: Hashes) -> Int64s:
        """Of each id its cells in its bucket, [n, 4], one in each row."""
        rows = np.arange(_DEPTH, dtype=np.uint64)
        # Hashed once more: the high bits have named the bucket.
        mixed = hashed(hashes[:, None] + hashed(rows)) >> np.uint64(32)
        place = (mixed * np.uint64(self._width)) >> np.uint64(32)
        return (place + rows * np.uint64(self._width)).astype(np.int64)

    def _halve(self, buckets: Int64s, journal: Journal | None) -> None:
        while buckets.size:
            if journal is not None:
                journal.note(self._cells, buckets)
                journal.note(self._sums, buckets)
            self._cells[buckets] >>= 1
            self._sums[buckets] >>= 1
            buckets = buckets[self._sums[buckets] > self._most]
