"""Which share of each branch a merge takes: a search for what the target's validation likes best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# One share a branch, which add up to 1.
Shares = tuple[float, ...]


@dataclass(frozen=True)
class Choice:
    """What a search found.

    Attributes:
        shares: that were chosen; tried: all that were tried with their values, in the order of the search.
    """

    shares: Shares
    tried: dict[Shares, float]

    def alone(self, branch: int) -> float:
        """The value of one branch alone."""
        return self.tried[one_hot(branch, len(self.shares))]


def one_hot(branch: int, branches: int) -> Shares:
    return tuple(float(place == branch) for place in range(branches))


def search(value_of: Callable[[Shares], float], branches: int, grid: Sequence[float]) -> Choice:
    """The shares of branches with the highest value.

    Each branch alone is tried first. Then, from the best one on, each next best is mixed in by every share
    of the grid, and what helped stays (the greedy search of ForkMerge; Jiang et al. 2023). With two branches
    these are all shares of the grid. So the chosen value is no lower than that of any branch alone. Equal
    values go to what was tried first, and the target's own branch, 0, comes before all.

    Args:
        value_of: called once for each that is tried, in the same order on every rank; NaN is no value.
        grid: with 0 and 1; shares of the branch that is mixed in. Of two branches it is always the second.

    Raises:
        ValueError: nothing has a value.
    """
    tried: dict[Shares, float] = {}

    def attempt(shares: Shares) -> None:
        if shares not in tried:
            tried[shares] = value_of(shares)

    def better(shares: Shares, than: Shares) -> bool:
        return tried[shares] > tried[than] or (math.isnan(tried[than]) and not math.isnan(tried[shares]))

    def best_of(candidates: Sequence[Shares]) -> Shares:
        best = candidates[0]
        for candidate in candidates[1:]:
            best = candidate if better(candidate, best) else best
        return best

    alone = [one_hot(branch, branches) for branch in range(branches)]
    for shares in alone:
        attempt(shares)
    best = best_of(alone)
    # The best one first, of equal ones the earlier.
    order = sorted(range(branches), key=lambda branch: _descending(tried[alone[branch]]))
    if branches == 2:
        # Shares of the second, whichever is better alone.
        best, order = alone[0], [0, 1]
    for branch in order[1:]:
        mixed = [best, *(_mixed(best, branch, share) for share in sorted(grid))]
        for shares in mixed:
            attempt(shares)
        best = best_of(mixed)
    if math.isnan(tried[best]):
        raise ValueError("no merge has a value")
    return Choice(best, tried)


def _descending(value: float) -> float:
    return math.inf if math.isnan(value) else -value


def _mixed(shares: Shares, branch: int, share: float) -> Shares:
    """The shares with so much of a branch mixed in; they add up to 1 as the former do."""
    if share == 1:
        return one_hot(branch, len(shares))
    return tuple(each * (1 - share) + share * (place == branch) for place, each in enumerate(shares))
