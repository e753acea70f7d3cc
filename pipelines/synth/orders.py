"""Planted signals of who acts together and in which order: `pair` and `opposite`.

Items are pairs (category, kind); candidates are of a kind, or goal, that behaviors say nothing about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from pipelines.synth.log import (
    DAY,
    Floats,
    Ints,
    PlantedLog,
    Seen,
    independent_split,
    sigmoid,
    split_users,
    sums,
)

PAIR_CATEGORIES: Final = 10
PAIR_BEHAVIORS: Final = 60
NO_KIND: Final = 5  # of candidates; 1 to 4 are those of behaviors
OPPOSITE_CATEGORIES: Final = 20
OPPOSITE_BEHAVIORS: Final = 50
CANDIDATES: Final = 4
_FAVOURITES, _LOYALTY, _DECAY = 2, 0.6, 10.0


def pair_worth(seed: int, target: Mapping[str, Ints], seen: Seen) -> Floats:
    """The sign of its kind for behaviors of the candidate's category, else 0.

    Kinds 1 and 2 are the signs -1 and +1 of side one, 3 and 4 those of side two. With x and y the signs that
    a user's behaviors of the category have on either side (0 where there are none): label ~
    Bernoulli(sigmoid(2.5 x y)). Target and one behavior together say nothing; target and two do. That is an
    interaction of order 3, for Stacked TIN's order law.
    """
    del seed
    sign = np.where(seen.ids["kind_id"] % 2 == 1, -1.0, 1.0)
    return np.where(seen.ids["category_id"] == target["category_id"], sign, 0.0)


def _side_worth(side: int, target: Mapping[str, Ints], seen: Seen) -> Floats:
    """`pair_worth` of the behaviors of a side, 1 or 2, which stands in the place of a seed."""
    on_side = (seen.ids["kind_id"] + 1) // 2 == side
    return np.where(on_side, pair_worth(0, target, seen), 0.0)


def opposite_worth(seed: int, target: Mapping[str, Ints], seen: Seen) -> Floats:
    """exp(-n / 10) for behaviors of the candidate's category, else 0.

    n counts the newer behaviors where the candidate's goal is 1, the older ones where it is 2. With x = sum_j
    worth_j: label ~ Bernoulli(sigmoid(-2.5 + 5 (1 - exp(-x)))). One order of preference a goal:
    target-decoupled SASRec's case for a user vector a group (check S4).
    """
    del seed
    newer, older = seen.rank - 1, OPPOSITE_BEHAVIORS - seen.rank
    between = np.where(target["goal_id"] == 1, newer, older)
    return np.where(seen.ids["category_id"] == target["category_id"], np.exp(-between / _DECAY), 0.0)


def pair(seed: int, users: int) -> PlantedLog:
    """`users` train users of 60 behaviors, one request of 4 candidates each.

    Category and side are uniform; a user has one sign for each category and side.
    """
    rng = np.random.default_rng([seed, 1])
    splits = {}
    for split, (first, count) in split_users(users).items():
        signs = rng.integers(0, 2, (count, PAIR_CATEGORIES + 1, 2))
        category = rng.integers(1, PAIR_CATEGORIES + 1, (count, PAIR_BEHAVIORS))
        side = rng.integers(0, 2, category.shape)
        kind = 1 + 2 * side + signs[np.arange(count)[:, None], category, side]
        history = _items(category, "kind_id", kind, NO_KIND)
        wanted = rng.integers(1, PAIR_CATEGORIES + 1, (count, CANDIDATES))
        shown = _items(wanted, "kind_id", np.full_like(wanted, NO_KIND), NO_KIND)
        age = _ages(rng, category.shape)
        x, y = (np.sign(sums(_side_worth, side, shown, history, age)) for side in (1, 2))
        splits[split] = independent_split(rng, first, history, age, shown, sigmoid(2.5 * x * y))
    features = {"item_id": PAIR_CATEGORIES * NO_KIND + 1, "category_id": PAIR_CATEGORIES + 1}
    return PlantedLog({**features, "kind_id": NO_KIND + 1}, ("category_id",), splits)


def opposite(seed: int, users: int) -> PlantedLog:
    """`users` train users of 50 behaviors, one request of 4 candidates each.

    60 % of the newer half of the behaviors are in 2 favourite categories, 60 % of the older half in 2 others;
    the rest in any of 20. A third of the candidates each comes from these three sources; goals are uniform.
    Behaviors have goals too, which say nothing. `whole_id` is 1 for all: grouping by it decouples nothing.
    """
    rng = np.random.default_rng([seed, 1])
    splits = {}
    for split, (first, count) in split_users(users).items():
        liked = rng.integers(1, OPPOSITE_CATEGORIES + 1, (count, 2, _FAVOURITES))
        half = np.arange(OPPOSITE_BEHAVIORS) * 2 // OPPOSITE_BEHAVIORS
        shape = (count, OPPOSITE_BEHAVIORS)
        loyal = liked[np.arange(count)[:, None], half, rng.integers(0, _FAVOURITES, shape)]
        other = rng.integers(1, OPPOSITE_CATEGORIES + 1, shape)
        category = np.where(rng.random(shape) < _LOYALTY, loyal, other)
        shown_shape = (count, CANDIDATES)
        source = rng.integers(0, 3, shown_shape)
        chosen = liked[np.arange(count)[:, None], source % 2, rng.integers(0, _FAVOURITES, shown_shape)]
        wanted = np.where(source < 2, chosen, rng.integers(1, OPPOSITE_CATEGORIES + 1, shown_shape))
        history, shown = (
            _items(ids, "goal_id", rng.integers(1, 3, ids.shape), 2) for ids in (category, wanted)
        )
        history, shown = ({**ids, "whole_id": np.ones_like(ids["item_id"])} for ids in (history, shown))
        age = _ages(rng, shape)
        x = sums(opposite_worth, seed, shown, history, age)
        probability = sigmoid(-2.5 + 5 * (1 - np.exp(-x)))
        splits[split] = independent_split(rng, first, history, age, shown, probability)
    features = {"item_id": OPPOSITE_CATEGORIES * 2 + 1, "category_id": OPPOSITE_CATEGORIES + 1}
    return PlantedLog({**features, "goal_id": 3, "whole_id": 2}, ("category_id",), splits)


def _ages(rng: np.random.Generator, shape: tuple[int, ...]) -> Ints:
    return -np.sort(-rng.integers(3_600, 90 * DAY, shape), axis=1)


def _items(category: Ints, name: str, kind: Ints, kinds: int) -> dict[str, Ints]:
    return {"item_id": (category - 1) * kinds + kind, "category_id": category, name: kind}
