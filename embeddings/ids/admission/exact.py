"""The counter `exact`: how often each id was seen that waits for a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from embeddings.ids.hashing import Hashes
from embeddings.ids.journal import Journal
from embeddings.ids.rules import IdRules, Ids

Int64s = npt.NDArray[np.int64]
Counts = npt.NDArray[np.uint16]
# The new ids are merged with the others where they are more than this, and than this part of the others.
_MOST_NEW = 1 << 14
_NEW_PART = 32


class _Waiting(NamedTuple):
    """Ids that wait, ascending, each once, and the sightings of each; 0 where it waits no more.

    Ids never change in place, counts do.
    """

    ids: Ids
    counts: Counts

    def find(self, wanted: Ids) -> tuple[Int64s, npt.NDArray[np.bool_]]:
        """The place of each, and whether it is there."""
        place = np.searchsorted(self.ids, wanted)
        if not self.ids.size:
            return place, np.zeros(wanted.size, dtype=np.bool_)
        found: npt.NDArray[np.bool_] = self.ids[place.clip(max=self.ids.size - 1)] == wanted
        return place, found

    def with_others(self, ids: Ids, counts: Counts) -> _Waiting:
        """With ids that are not here yet, ascending; without those that wait no more."""
        stays = self.counts > 0
        kept = self.ids[stays]
        place = np.searchsorted(kept, ids)
        return _Waiting(np.insert(kept, place, ids), np.insert(self.counts[stays], place, counts))


class ExactCounter:
    """Keeps 10 bytes for each id that waits, and forgets an id when it is admitted.

    An id that was admitted and found no room, or that lost its row, is counted from 0 again. Nothing but
    admission takes an id off the list, so that it grows with the number of ids that never get a row.
    """

    def __init__(self, rules: IdRules, buckets: range) -> None:
        self._enough = rules.admit_count
        # Both are replaced as a whole, so that a journal keeps the former ones: those that have waited long,
        # and those that came lately, among which it is cheap to put others.
        self._held = np.empty(2, dtype=object)
        self.load({})

    def admit(
        self, ids: Ids, hashes: Hashes, counts: Int64s, step: int, journal: Journal | None
    ) -> npt.NDArray[np.bool_]:
        """Those that are seen in this step, and were seen often enough with it."""
        # Ascending, they are found much faster.
        order = np.argsort(ids)
        admitted = np.empty(ids.size, dtype=np.bool_)
        admitted[order] = self._admit(ids[order], counts[order], journal)
        return admitted

    def _admit(self, ids: Ids, counts: Int64s, journal: Journal | None) -> npt.NDArray[np.bool_]:
        """The same for ids in ascending order."""
        total, new = counts.copy(), np.ones(ids.size, dtype=np.bool_)
        places = []
        for waiting in self._both():
            place, found = waiting.find(ids)
            total[found] += waiting.counts[place[found]]
            new &= ~found
            places.append((waiting, place, found))
        admitted: npt.NDArray[np.bool_] = (total >= self._enough) & (counts > 0)
        # 65,535 at most, since these are not enough.
        left = np.where(admitted, 0, total).astype(np.uint16)
        for waiting, place, found in places:
            if journal is not None:
                journal.note(waiting.counts, place[found])
            waiting.counts[place[found]] = left[found]
        self._add(ids[new & (left > 0)], left[new & (left > 0)], journal)
        return admitted

    def state(self) -> dict[str, npt.NDArray[Any]]:
        old, lately = self._both()
        stays = lately.counts > 0
        every = old.with_others(lately.ids[stays], lately.counts[stays])
        return {"ids": every.ids, "counts": every.counts}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        ids = np.array(state.get("ids", ()), dtype=np.int64)
        nothing = np.zeros(0, dtype=np.int64)
        self._held[0] = _Waiting(ids, np.array(state.get("counts", ()), dtype=np.uint16))
        self._held[1] = _Waiting(nothing, nothing.astype(np.uint16))

    def _both(self) -> tuple[_Waiting, _Waiting]:
        return self._held[0], self._held[1]

    def _add(self, ids: Ids, counts: Counts, journal: Journal | None) -> None:
        if not ids.size:
            return
        if journal is not None:
            journal.note(self._held, np.arange(2))
        self._held[1] = self._both()[1].with_others(ids, counts)
        old, lately = self._both()
        if lately.ids.size > max(_MOST_NEW, old.ids.size // _NEW_PART):
            self.load(self.state())
