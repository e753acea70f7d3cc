"""Planted signals of who acts together and in which order: `pair` and `opposite`.

Items are pairs (category, kind); candidates are of a kind, or goal, that behaviors say nothing about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from pipelines.synth.log import (
    Behaviors,
    Draws,
    Floats,
    Ints,
    OneRequestEach,
    Worth,
    ages,
    of_category,
    pairs,
)

PAIR_CATEGORIES: Final = 10
PAIR_BEHAVIORS: Final = 60
NO_KIND: Final = 5  # of candidates; 1 to 4 are those of behaviors
OPPOSITE_CATEGORIES: Final = 20
OPPOSITE_BEHAVIORS: Final = 50
CANDIDATES: Final = 4
_FAVOURITES, _LOYALTY, _DECAY = 2, 0.6, 10.0


def pair_worth(seed: int, target: Mapping[str, Ints], seen: Behaviors) -> Floats:
    """The sign of its kind for behaviors of the candidate's category, else 0.

    Kinds 1 and 2 are the signs -1 and +1 of side one, 3 and 4 those of side two. With x and y the signs that
    a user's behaviors of the category have on either side (0 where there are none): label ~
    Bernoulli(sigmoid(2.5 x y)). Target and one behavior together say nothing; target and two do. That is an
    interaction of order 3, for Stacked TIN's order law.
    """
    del seed
    sign = np.where(seen.ids["kind_id"] % 2 == 1, -1.0, 1.0)
    return of_category(target, seen, sign)


def _side_worth(side: int) -> Worth:
    """`pair_worth` of the behaviors of a side, 1 or 2."""

    def worth(seed: int, target: Mapping[str, Ints], seen: Behaviors) -> Floats:
        on_side = (seen.ids["kind_id"] + 1) // 2 == side
        return np.where(on_side, pair_worth(seed, target, seen), 0.0)

    return worth


def opposite_worth(seed: int, target: Mapping[str, Ints], seen: Behaviors) -> Floats:
    """exp(-n / 10) for behaviors of the candidate's category, else 0.

    n counts the newer behaviors where the candidate's goal is 1, the older ones where it is 2. With x = sum_j
    worth_j: label ~ Bernoulli(sigmoid(-2.5 + 5 (1 - exp(-x)))). One order of preference a goal:
    target-decoupled SASRec's case for a user vector a group (check S4).
    """
    del seed
    newer, older = seen.rank - 1, OPPOSITE_BEHAVIORS - seen.rank
    between = np.where(target["goal_id"] == 1, newer, older)
    return of_category(target, seen, np.exp(-between / _DECAY))


def _pair(rng: np.random.Generator, seed: int, users: int) -> Draws:
    """60 behaviors and 4 candidates a user.

    Category and side are uniform; a user has one sign for each category and side.
    """
    del seed
    signs = rng.integers(0, 2, (users, PAIR_CATEGORIES + 1, 2))
    category = rng.integers(1, PAIR_CATEGORIES + 1, (users, PAIR_BEHAVIORS))
    side = rng.integers(0, 2, category.shape)
    kind = 1 + 2 * side + signs[np.arange(users)[:, None], category, side]
    history = pairs(category, "kind_id", kind, NO_KIND)
    wanted = rng.integers(1, PAIR_CATEGORIES + 1, (users, CANDIDATES))
    shown = pairs(wanted, "kind_id", np.full_like(wanted, NO_KIND), NO_KIND)
    return history, shown, ages(rng, category.shape)


def _opposite(rng: np.random.Generator, seed: int, users: int) -> Draws:
    """50 behaviors and 4 candidates a user.

    60 % of the newer half of the behaviors are in 2 favourite categories, 60 % of the older half in 2 others;
    the rest in any of 20. A third of the candidates each comes from these three sources; goals are uniform.
    Behaviors have goals too, which say nothing. `whole_id` is 1 for all: grouping by it decouples nothing.
    """
    del seed
    liked = rng.integers(1, OPPOSITE_CATEGORIES + 1, (users, 2, _FAVOURITES))
    half = np.arange(OPPOSITE_BEHAVIORS) * 2 // OPPOSITE_BEHAVIORS
    shape = (users, OPPOSITE_BEHAVIORS)
    loyal = liked[np.arange(users)[:, None], half, rng.integers(0, _FAVOURITES, shape)]
    other = rng.integers(1, OPPOSITE_CATEGORIES + 1, shape)
    category = np.where(rng.random(shape) < _LOYALTY, loyal, other)
    shown_shape = (users, CANDIDATES)
    source = rng.integers(0, 3, shown_shape)
    chosen = liked[np.arange(users)[:, None], source % 2, rng.integers(0, _FAVOURITES, shown_shape)]
    wanted = np.where(source < 2, chosen, rng.integers(1, OPPOSITE_CATEGORIES + 1, shown_shape))
    history, shown = (
        {**pairs(ids, "goal_id", rng.integers(1, 3, ids.shape), 2), "whole_id": np.ones_like(ids)}
        for ids in (category, wanted)
    )
    return history, shown, ages(rng, shape)


pair = OneRequestEach(
    {"item_id": PAIR_CATEGORIES * NO_KIND + 1, "category_id": PAIR_CATEGORIES + 1, "kind_id": NO_KIND + 1},
    _pair,
    lambda total: 2.5 * np.sign(total(_side_worth(1))) * np.sign(total(_side_worth(2))),
)
opposite = OneRequestEach(
    {
        "item_id": OPPOSITE_CATEGORIES * 2 + 1,
        "category_id": OPPOSITE_CATEGORIES + 1,
        "goal_id": 3,
        "whole_id": 2,
    },
    _opposite,
    lambda total: -2.5 + 5 * (1 - np.exp(-total(opposite_worth))),
)
