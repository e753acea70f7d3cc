"""Which raw ids of a feature get a row of its tables, and which give theirs up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from embeddings.ids.hashing import Hashes, hashed

Ids = npt.NDArray[np.int64]
# Rows of a bucket: an id has a place in one bucket only, so that looking for it is looking at so many rows.
_BUCKET = 64


@dataclass(frozen=True)
class IdRules:
    """The rules of one feature's ids. Times are event times in seconds, never those of a clock.

    Attributes:
        capacity: the most ids that have a row at a time.
        shared_rows: rows that all other ids share, by hash.
        admission: name of one of `embeddings.ids.admission.table.ADMISSIONS`.
        admit_count: sightings that an id needs, for `count`; counter: how they are counted.
        sketch_cells: of the counter `sketch`.
        admit_chance: of each sighting, for `chance`.
        counts: the sightings that count: as a candidate, or all.
        eviction: name of one of `embeddings.ids.eviction.table.EVICTIONS`.
        half_life: for `lfu_decay`.
        ttl: an id that was not seen for so long loses its row; 0 = never.
        protected_rows: about so many rows, those seen last, stay whatever their age.
        seed: of draws of `chance`.
        within: another map, of which this one holds some ids: those of a group with a capacity of its own. An
            id that leaves that map leaves this one. Empty: the map is no part of another.
        bucket_count: buckets of the map; 0 = as many as the capacity fills.
    """

    capacity: int
    shared_rows: int = 64
    admission: str = "all"
    admit_count: int = 2
    counter: Literal["exact", "sketch"] = "exact"
    sketch_cells: int = 1 << 20
    admit_chance: float = 0.1
    counts: Literal["all", "candidates"] = "all"
    eviction: str = "lru"
    half_life: int = 7 * 86_400
    ttl: int = 0
    protected_rows: int = 0
    seed: int = 17
    within: str = ""
    bucket_count: int = 0

    @property
    def buckets(self) -> int:
        """Buckets of the whole map, whatever the number of ranks; each has its own part of the rows."""
        return self.bucket_count or max(1, self.capacity // _BUCKET)

    def part(self, feature: str, capacity: int) -> IdRules:
        """Rules of a map that holds some of this one's ids, with as many buckets of fewer rows.

        So a bucket of both belongs to the same rank, which takes an id out of both. What has a row in the
        whole map may have one in the part, at its next sighting that counts.
        """
        return replace(
            self,
            capacity=capacity,
            admission="all",
            ttl=0,
            protected_rows=0,
            within=feature,
            bucket_count=self.buckets,
        )

    @property
    def ways(self) -> int:
        """Rows of a bucket."""
        return self.capacity // self.buckets

    @property
    def map_bytes(self) -> int:
        """Host memory of the whole map, without ids that `count` counts exactly: some 10 bytes each."""
        sketched = self.admission == "count" and self.counter == "sketch"
        return 25 * (self.rows - self.shared_rows) + (8 * self.sketch_cells if sketched else 0)

    @property
    def rows(self) -> int:
        """Rows of the feature's tables: the shared ones, then those of the buckets."""
        return self.shared_rows + self.buckets * self.ways

    @property
    def layout(self) -> tuple[int, int, int]:
        """What decides which rows an id may have."""
        return self.shared_rows, self.buckets, self.ways

    @property
    def admission_state(self) -> tuple[str, ...]:
        """What the layout of the state that admission keeps depends on, besides the buckets."""
        if self.admission != "count":
            return (self.admission,)
        return (self.admission, self.counter, *([str(self.sketch_cells)] if self.counter == "sketch" else []))

    def first_row(self, buckets: range) -> int:
        """The first row of some buckets, of the whole table."""
        return self.shared_rows + buckets.start * self.ways

    def bucket(self, hashes: Hashes) -> npt.NDArray[np.int64]:
        """The bucket of each id, by its hash."""
        high = hashes >> np.uint64(32)
        return ((high * np.uint64(self.buckets)) >> np.uint64(32)).astype(np.int64)

    def shared_row(self, hashes: Hashes) -> npt.NDArray[np.int64]:
        """The row of each id that has none of its own."""
        # Hashed once more: neither the bucket nor the mark says anything about it.
        mixed = hashed(hashes) >> np.uint64(32)
        return ((mixed * np.uint64(self.shared_rows)) >> np.uint64(32)).astype(np.int64)


def part_name(feature: str, group: str) -> str:
    """The name of the map of those ids that have a row in a group with a capacity of its own."""
    return f"{feature}@{group}"


def part_of(buckets: int, rank: int, world_size: int) -> range:
    """The buckets whose ids a rank looks after."""
    return range(buckets * rank // world_size, buckets * (rank + 1) // world_size)


def owner_of(buckets: int, bucket: npt.NDArray[np.int64], world_size: int) -> npt.NDArray[np.int64]:
    """The rank of each bucket, see `part_of`."""
    first = np.array([part_of(buckets, rank, world_size).start for rank in range(world_size)])
    return np.searchsorted(first, bucket, side="right") - 1
