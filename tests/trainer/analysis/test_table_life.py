"""What is known of a table's rows, against plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.analysis.table_life import (
    AGES,
    COUNTS,
    hottest,
    median_age,
    middle_and_high,
    norms_by_count,
    share_of_top,
    staleness,
)

DAY = 86_400
counts = st.lists(st.integers(0, 100_000) | st.integers(0, 3), min_size=1, max_size=80)


@given(counts, st.integers(0, 2**32 - 1))
def test_bands_are_a_partition_with_percentiles(values: list[int], seed: int) -> None:
    count = np.array(values)
    norms = np.random.default_rng(seed).gamma(2, size=count.size).astype(np.float32)
    found = norms_by_count(norms, count)
    assert sum(band.rows for band in found) == count.size
    assert [band.low for band in found] == [low for low in COUNTS if low in {band.low for band in found}]
    for band in found:
        inside = norms[(count >= band.low) & (count < (band.high or 10**9))]
        assert band.rows == inside.size
        shown = (band.tenth, band.median, band.ninetieth)
        assert shown == pytest.approx(np.percentile(inside, [10, 50, 90]))


@given(counts, st.sampled_from([0.01, 0.2, 1.0]))
def test_the_share_of_the_top(values: list[int], share: float) -> None:
    seen = sorted((value for value in values if value), reverse=True)
    found = share_of_top(np.array(values), share)
    if not seen:
        assert math.isnan(found)
        return
    assert found == pytest.approx(sum(seen[: max(1, round(share * len(seen)))]) / sum(seen))


@given(counts, st.integers(1, 12))
def test_the_hottest_rows_are_the_first_of_a_sort(values: list[int], number: int) -> None:
    rows = sorted((row for row, value in enumerate(values) if value), key=lambda row: (-values[row], row))
    assert hottest(np.array(values), number).tolist() == rows[:number]


@given(st.lists(st.integers(-DAY, 800 * DAY), max_size=50))
def test_stale_ids_by_days(seconds: list[int]) -> None:
    """Ids that were seen after the newest request are none of an older day."""
    now, expected = 10**9, [0] * len(AGES)
    for each in seconds:
        days = each // DAY
        expected[max(place for place, low in enumerate(AGES) if low <= max(days, 0))] += 1
    last = now - np.array(seconds, dtype=np.int64)
    assert staleness(last, now).tolist() == expected
    if seconds:
        assert median_age(last, now) == pytest.approx(np.median(seconds) / DAY)


def test_nothing_has_no_numbers() -> None:
    none = np.zeros(0, dtype=np.int64)
    assert math.isnan(median_age(none, 5)) and all(map(math.isnan, middle_and_high(none.astype(float))))
    assert (
        hottest(np.zeros(4, dtype=np.int64)).size == 0 and norms_by_count(none.astype(np.float32), none) == []
    )
