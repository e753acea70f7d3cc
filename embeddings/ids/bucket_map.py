"""Raw ids to rows, without collisions: the map of some of a feature's buckets.

An id's hash names its bucket, and in the bucket it may have any of some 64 rows. Eight bits of the hash are
kept beside each row, so that an id is looked for by comparing as many bytes, and then hardly ever more than
one id. A full bucket makes room by itself. So what happens in one bucket depends on the ids of this bucket
alone, and a map that is dealt to any number of ranks by buckets is the same map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embeddings.ids.admission.table import ADMISSIONS
from embeddings.ids.eviction.eviction import NEVER
from embeddings.ids.eviction.table import EVICTIONS
from embeddings.ids.hashing import Hashes, hashed
from embeddings.ids.journal import Journal
from embeddings.ids.rules import IdRules, Ids

Int64s = npt.NDArray[np.int64]
# Begins the names of the arrays in a state that admission keeps.
ADMISSION = "admission."
_TICKS = 16


@dataclass(frozen=True)
class Sightings:
    """Ids that a step holds, each once.

    Attributes:
        ids: int64 [n]; counts: how often each was seen in a way that counts; newest: newest event time of
            each, seconds.
    """

    ids: Ids
    counts: Int64s
    newest: Int64s

    @staticmethod
    def merged(ids: Ids, counts: Int64s, newest: Int64s) -> tuple[Sightings, Int64s]:
        """Of ids that may repeat, ascending; and the place of each given one among them."""
        distinct, place = np.unique(ids, return_inverse=True)
        total = np.zeros(distinct.size, dtype=np.int64)
        last = np.full(distinct.size, np.iinfo(np.int64).min)
        np.add.at(total, place, counts)
        np.maximum.at(last, place, newest)
        return Sightings(distinct, total, last), place


@dataclass
class Counts:
    """What became of distinct ids, since the last report.

    Attributes:
        known: ids of a step that had a row; admitted: that got one; rejected: that admission turned away;
            crowded: that were admitted and found no room.
        evicted: that gave theirs up to others; expired: whose time was over.
    """

    known: int = 0
    admitted: int = 0
    rejected: int = 0
    crowded: int = 0
    evicted: int = 0
    expired: int = 0


@dataclass(frozen=True)
class Found:
    """What a map did for the ids of a step.

    Attributes:
        rows: of each id; new_rows: those that have just been given to new ids; gone: ids that lost theirs.
    """

    rows: Int64s
    new_rows: Int64s
    gone: Ids


class BucketMap:
    """The ids of some buckets of one feature.

    Args:
        rules: of the feature; buckets: which of its buckets.

    Attributes:
        counts: what became of ids since somebody set it to `Counts()`.
    """

    def __init__(self, rules: IdRules, buckets: range) -> None:
        self.rules, self.buckets, self.counts = rules, buckets, Counts()
        rows = len(buckets) * rules.ways
        # 0: nobody has the row.
        self._marks = np.zeros(rows, dtype=np.uint8)
        self._keys, self._last, self._uses = (np.zeros(rows, dtype=np.int64) for _ in range(3))
        self._admission = ADMISSIONS[rules.admission](rules, buckets)
        self._eviction = EVICTIONS[rules.eviction](rules)
        # The first row of this part, of the whole table.
        self._first = rules.first_row(buckets)

    @property
    def live(self) -> int:
        """Ids that have a row."""
        return int(np.count_nonzero(self._marks))

    def look_up(self, ids: Ids) -> Int64s:
        """The row of each id, which may repeat; nothing changes."""
        hashes = hashed(ids)
        slots = self._find(ids, hashes)
        return np.where(slots >= 0, slots + self._first, self.rules.shared_row(hashes))

    def take(
        self, seen: Sightings, now: int, step: int, ticked: bool, journal: Journal | None = None
    ) -> Found:
        """The row of each id of a step of training; ids get rows and lose them.

        Args:
            seen: all sightings of this part's ids in the step, over all ranks.
            now: the newest request so far, seconds; step: number of the step.
            ticked: whether rows whose time is over are to be freed before.
            journal: told of everything that changes, where that may have to be taken back.
        """
        gone = [self._expire(now, journal)] if ticked else []
        hashes = hashed(seen.ids)
        slots = self._find(seen.ids, hashes)
        known = np.flatnonzero(slots >= 0)
        self._touch(slots[known], seen.counts[known], seen.newest[known], journal)
        unknown = np.flatnonzero(slots < 0)
        alive = unknown
        if self.rules.ttl:
            alive = unknown[seen.newest[unknown] >= now - self.rules.ttl]
        admitted = alive[
            self._admission.admit(seen.ids[alive], hashes[alive], seen.counts[alive], step, journal)
        ]
        given, evicted = self._place(seen, hashes, admitted, slots[known], now, journal)
        slots[admitted] = given
        self.counts.known += known.size
        self.counts.rejected += unknown.size - admitted.size
        self.counts.admitted += int((given >= 0).sum())
        self.counts.crowded += int((given < 0).sum())
        rows = np.where(slots >= 0, slots + self._first, self.rules.shared_row(hashes))
        new_rows = np.sort(given[given >= 0]) + self._first
        return Found(rows, new_rows, np.concatenate([*gone, evicted]))

    def remove(self, ids: Ids, journal: Journal | None = None) -> None:
        """Free the rows of ids, as far as they have any."""
        slots = self._find(ids, hashed(ids))
        self._free(slots[slots >= 0], journal)

    def entries(self) -> tuple[Ids, Int64s]:
        """Every id that has a row, ascending, and its row."""
        return self.entries_of(self.state(), self.buckets, self.rules)

    @staticmethod
    def entries_of(
        state: Mapping[str, npt.NDArray[Any]], buckets: range, rules: IdRules
    ) -> tuple[Ids, Int64s]:
        """The same from the state of some buckets."""
        slots = np.flatnonzero(state["marks"])
        ids = state["keys"][slots]
        order = np.argsort(ids, kind="stable")
        return ids[order], slots[order] + rules.first_row(buckets)

    @staticmethod
    def state_of_entries(
        ids: Ids, rows: Int64s, last: Int64s, uses: Int64s, rules: IdRules
    ) -> dict[str, npt.NDArray[Any]]:
        """The state of a whole map with these entries, without what admission keeps."""
        size = rules.rows - rules.shared_rows
        state = {name: np.zeros(size, dtype=np.int64) for name in ("keys", "last", "uses")}
        marks, slots = np.zeros(size, dtype=np.uint8), rows - rules.shared_rows
        marks[slots] = _mark(hashed(ids))
        for name, values in (("keys", ids), ("last", last), ("uses", uses)):
            state[name][slots] = values
        return {"marks": marks, **state}

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """What a checkpoint keeps, bucket after bucket; the arrays are the map's own.

        Free rows hold zeros, so that equal maps have equal bytes.
        """
        own: dict[str, npt.NDArray[Any]] = {
            "marks": self._marks,
            "keys": self._keys,
            "last": self._last,
            "uses": self._uses,
        }
        return own | {ADMISSION + name: each for name, each in self._admission.state().items()}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take up what `state` gave, of the very same buckets; without admission's part it begins anew."""
        for name, own in (("marks", self._marks), ("keys", self._keys), ("last", self._last)):
            own[...] = state[name]
        self._uses[...] = state["uses"]
        given = {name: each for name, each in state.items() if name.startswith(ADMISSION)}
        self._admission.load({name.removeprefix(ADMISSION): each for name, each in given.items()})

    def _find(self, ids: Ids, hashes: Hashes) -> Int64s:
        """The slot of each id in the arrays, -1 where it has none."""
        slots = np.full(ids.size, -1, dtype=np.int64)
        if not len(self.buckets):
            return slots
        ways = self.rules.ways
        bucket = self.rules.bucket(hashes) - self.buckets.start
        same = self._marks.reshape(-1, ways)[bucket] == _mark(hashes)[:, None]
        flat = np.flatnonzero(same)
        at = flat // ways
        slot = bucket[at] * ways + flat % ways
        right = self._keys[slot] == ids[at]
        slots[at[right]] = slot[right]
        return slots

    def _touch(self, slots: Int64s, counts: Int64s, newest: Int64s, journal: Journal | None) -> None:
        if journal is not None:
            journal.note(self._last, slots)
            journal.note(self._uses, slots)
        before = self._last[slots]
        last = np.maximum(before, newest)
        self._uses[slots] = self._eviction.seen(self._uses[slots], before, last, counts)
        self._last[slots] = last

    def _place(
        self,
        seen: Sightings,
        hashes: Hashes,
        new: Int64s,
        in_use: Int64s,
        now: int,
        journal: Journal | None,
    ) -> tuple[Int64s, Ids]:
        """Give rows to new ids -> the slot of each, -1 where the bucket has none to give; and who lost them.

        Those seen most get theirs first, then those seen last. No row is taken away that the same step uses.
        """
        given = np.full(new.size, -1, dtype=np.int64)
        if not new.size:
            return given, new
        ways = self.rules.ways
        bucket = self.rules.bucket(hashes[new]) - self.buckets.start
        order = np.lexsort((hashes[new], -seen.newest[new], -seen.counts[new], bucket))
        touched, first, size = np.unique(bucket[order], return_index=True, return_counts=True)
        scores = self._scores(touched, size, in_use, now)
        for turn in range(min(int(size.max()), ways)):
            open_ = np.flatnonzero(size > turn)
            way = scores[open_].argmin(1)
            free = scores[open_, way] < NEVER
            scores[open_, way] = NEVER
            given[order[first[open_[free]] + turn]] = touched[open_[free]] * ways + way[free]
        placed = np.flatnonzero(given >= 0)
        slots, ids = given[placed], new[placed]
        self._note_all(slots, journal)
        evicted = self._keys[slots[self._marks[slots] > 0]]
        self.counts.evicted += evicted.size
        self._marks[slots], self._keys[slots] = _mark(hashes[ids]), seen.ids[ids]
        self._last[slots] = seen.newest[ids]
        none = np.zeros(slots.size, dtype=np.int64)
        self._uses[slots] = self._eviction.seen(none, seen.newest[ids], seen.newest[ids], seen.counts[ids])
        return given, evicted

    def _scores(self, buckets: Int64s, wanted: Int64s, in_use: Int64s, now: int) -> Int64s:
        """[buckets, ways], see `Eviction.scores`; -1 for free rows.

        Args:
            buckets: ascending; wanted: the most rows that are to be given of each; in_use: slots that stay.
        """
        ways = self.rules.ways
        taken = self._marks.reshape(-1, ways)[buckets] > 0
        scores = np.where(taken, NEVER, -1)
        # Most buckets of a map that is not full have enough free rows: nobody's times and uses are read then.
        full = np.flatnonzero(ways - taken.sum(1) < wanted)
        uses, last = (array.reshape(-1, ways)[buckets[full]] for array in (self._uses, self._last))
        scores[full] = np.where(taken[full], self._eviction.scores(uses, last, now), -1)
        of_bucket = np.searchsorted(buckets, in_use // ways).clip(max=buckets.size - 1)
        here = buckets[of_bucket] == in_use // ways
        scores[of_bucket[here], in_use[here] % ways] = NEVER
        return scores

    def _expire(self, now: int, journal: Journal | None) -> Ids:
        """Free the rows of ids that were not seen for `ttl`, but for the protected ones of each bucket.

        Returns:
            Who lost them.
        """
        old = np.flatnonzero((self._marks > 0) & (self._last < now - self.rules.ttl))
        protected = -(-self.rules.protected_rows // self.rules.buckets)
        if protected and old.size:
            ways = self.rules.ways
            bucket = np.unique(old // ways)
            last = np.where(self._marks > 0, self._last, np.iinfo(np.int64).min).reshape(-1, ways)[bucket]
            # The first way among equals goes first, as in `_scores`.
            kept = last.argsort(axis=1, kind="stable")[:, max(0, ways - protected) :]
            old = np.setdiff1d(old, (bucket[:, None] * ways + kept).ravel())
        expired: Ids = self._keys[old]
        self._free(old, journal)
        self.counts.expired += old.size
        return expired

    def _free(self, slots: Int64s, journal: Journal | None) -> None:
        self._note_all(slots, journal)
        for array in (self._marks, self._keys, self._last, self._uses):
            array[slots] = 0

    def _note_all(self, slots: Int64s, journal: Journal | None) -> None:
        if journal is not None:
            for array in (self._marks, self._keys, self._last, self._uses):
                journal.note(array, slots)


def tick_of(time: int, ttl: int) -> int:
    """Rows whose time is over are freed where this grows: after every sixteenth of the TTL."""
    return time // max(1, ttl // _TICKS)


def _mark(hashes: Hashes) -> npt.NDArray[np.uint8]:
    """1 to 255 of each id."""
    return ((hashes & np.uint64(0xFF)) % np.uint64(255) + np.uint64(1)).astype(np.uint8)
