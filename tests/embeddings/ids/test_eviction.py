"""Who gives its row up, by each rule, on a stream that a reader can follow."""

from __future__ import annotations

import numpy as np
import pytest

from embeddings.ids.bucket_map import BucketMap, Sightings
from embeddings.ids.rules import IdRules

_HOUR = 3600


def take(map_: BucketMap, time: int, *seen: tuple[int, int], expires: bool = False) -> None:
    """Ids with their numbers of sightings, all at one time."""
    ids, counts = np.array(sorted(seen), dtype=np.int64).T
    map_.take(Sightings(ids, counts, np.full_like(ids, time)), time, 1, expires)


@pytest.mark.parametrize(
    ("eviction", "gone"), [("lru", {1}), ("lfu", {3}), ("lfu_decay", {2}), ("never", {4})]
)
def test_each_rule_picks_its_own(eviction: str, gone: set[int]) -> None:
    """1: often and first; 2: often long ago and once lately; 3: lately, less than both."""
    map_ = BucketMap(IdRules(capacity=3, eviction=eviction, half_life=_HOUR), range(1))
    take(map_, 0, (2, 40))
    take(map_, 5 * _HOUR - 20, (1, 100))
    take(map_, 5 * _HOUR - 10, (3, 7))
    take(map_, 5 * _HOUR - 5, (2, 1))
    take(map_, 5 * _HOUR - 1, (4, 1))
    assert {1, 2, 3, 4} - set(map_.entries()[0].tolist()) == gone


def test_protected_rows_outlive_their_time() -> None:
    for protected, left in ((0, [9]), (2, [2, 3, 9])):
        map_ = BucketMap(IdRules(capacity=5, ttl=100, protected_rows=protected), range(1))
        for time, id_ in ((10, 1), (20, 2), (30, 3)):
            take(map_, time, (id_, 1))
        take(map_, 500, (9, 1), expires=True)
        assert map_.entries()[0].tolist() == left


def test_a_full_bucket_gives_no_row_away_that_the_step_uses() -> None:
    map_ = BucketMap(IdRules(capacity=2), range(1))
    take(map_, 0, (1, 1), (2, 1))
    take(map_, 9, (1, 1), (2, 1), (3, 50))
    assert map_.entries()[0].tolist() == [1, 2] and map_.counts.crowded == 1
    take(map_, 9, (2, 1), (3, 1))
    assert map_.entries()[0].tolist() == [2, 3] and map_.counts.evicted == 1
