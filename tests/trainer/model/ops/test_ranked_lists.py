"""Ranked lists of several heads: the CPU's form against the plain one."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.model.ops.ranked_lists import best_first, united_by_places, united_by_sorting
from trainer.model.ops.traced import stable_sort

FEW = st.sampled_from([-math.inf, -1.0, -1e-45, -0.0, 0.0, 1e-45, 2.0, 3.4e38, math.inf])


@settings(max_examples=100, deadline=None)
@given(data=st.data(), rows=st.integers(0, 3), width=st.integers(1, 9))
def test_the_order_is_that_of_a_stable_sort(data: st.DataObject, rows: int, width: int) -> None:
    row = st.lists(FEW | st.floats(width=32, allow_nan=False), min_size=width, max_size=width)
    value = torch.tensor(data.draw(st.lists(row, min_size=rows, max_size=rows))).reshape(rows, width)
    order = best_first(value)
    assert torch.equal(order, stable_sort(value, descending=True).indices)
    assert best_first(value.double()).equal(order)


def test_nan_is_as_large_as_infinity() -> None:
    value = torch.tensor([[1.0, math.inf, math.nan, 2.0, -math.nan]])
    assert best_first(value).tolist() == [[1, 2, 4, 3, 0]]


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(0, 4),
    places=st.integers(1, 12),
    k=st.integers(1, 9),
    width=st.integers(1, 8),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_lists_are_united_as_by_sorting(
    seed: int, rows: int, places: int, k: int, width: int, share: float
) -> None:
    """Whatever the lists, those with nothing that counts among them."""
    rng = torch.Generator().manual_seed(seed)
    # Of each head's K best there are as many places as columns, so that K never is more than all places.
    places = max(places, min(k, width))
    column = torch.randint(0, width, (rows, places), generator=rng)
    real = torch.rand(rows, places, generator=rng) < share
    wanted = united_by_sorting(column, real, k, width)
    for found, expected in zip(united_by_places(column, real, k, width), wanted, strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
