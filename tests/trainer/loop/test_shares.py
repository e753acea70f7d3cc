"""The search for the shares of a merge."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.loop.shares import Shares, one_hot, search

GRID = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@given(st.integers(2, 5), st.integers(0, 99), st.sets(st.sampled_from(GRID)))
def test_what_is_chosen_is_no_worse_than_any_branch_alone_or_anything_tried(
    branches: int, seed: int, some: set[float]
) -> None:
    calls: list[Shares] = []

    def value_of(shares: Shares) -> float:
        calls.append(shares)
        return hash((shares, seed)) % 1000 / 1000

    grid = sorted(some | {0.0, 1.0})
    choice = search(value_of, branches, grid)
    assert len(calls) == len(set(calls)) and list(choice.tried) == calls
    assert choice.tried[choice.shares] >= max(choice.alone(branch) for branch in range(branches))
    assert choice.tried[choice.shares] == max(choice.tried.values())
    assert len(calls) <= branches + (branches - 1) * len(grid)
    for shares in calls:
        assert math.isclose(sum(shares), 1) and min(shares) >= 0


def test_two_branches_try_every_share_of_the_second_on_the_grid() -> None:
    for better in (0, 1):
        choice = search(lambda shares, better=better: shares[better], 2, (0.0, 0.3, 1.0))  # type: ignore[misc]
        assert set(choice.tried) == {(1.0, 0.0), (0.7, 0.3), (0.0, 1.0)}
        assert choice.shares == one_hot(better, 2)


def test_a_mixture_is_found_branch_by_branch() -> None:
    """Values that fall with the distance from (.4, .4, .2): B and then C are mixed in."""
    best = (0.48, 0.32, 0.2)
    choice = search(lambda s: -sum((a - b) ** 2 for a, b in zip(s, best, strict=True)), 3, GRID)
    assert choice.shares == pytest.approx(best)


def test_equal_values_go_to_the_targets_own_branch() -> None:
    assert search(lambda shares: 0.5, 4, GRID).shares == one_hot(0, 4)


def test_what_has_no_value_is_not_chosen() -> None:
    assert search(lambda s: math.nan if s[0] == 1 else -s[2], 3, GRID).shares == one_hot(1, 3)
    with pytest.raises(ValueError, match="no merge has a value"):
        search(lambda shares: math.nan, 2, GRID)
