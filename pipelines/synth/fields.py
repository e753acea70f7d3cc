"""Planted signals of two fields, category (A, 200 ids) and brand (B, 50 ids): `interference`, `decoupled`.

An item is a pair (A, B); ages are uniform over 90 days and say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from pipelines.synth.log import Behaviors, Draws, Floats, Ints, OneRequestEach, ages, of_category, pairs

CATEGORIES: Final = 200
BRANDS: Final = 50
BEHAVIORS: Final = 200
CANDIDATES: Final = 4
FEATURES: Final = {"item_id": CATEGORIES * BRANDS + 1, "category_id": CATEGORIES + 1, "brand_id": BRANDS + 1}
_FAVOURITES, _LOYALTY = 8, 0.5
_BRAND_FAVOURITES, _BRAND_LOYALTY, _LEANING = 3, 0.6, 0.85


def interference_worth(seed: int, target: Mapping[str, Ints], seen: Behaviors) -> Floats:
    """1 for behaviors of the candidate's category, else 0; the brand says nothing.

    With n = sum_j worth_j: label ~ Bernoulli(sigmoid(-1.8 + 3.6 (1 - exp(-n / 4)))). Some 40 of 200 behaviors
    share the candidate's brand, so where both fields are added into one vector the brand's part of the score
    crowds the relevant ones out: the inter-field interference that DSI-TIN decouples (section 2.5, D2).
    """
    del seed
    return of_category(target, seen, 1.0)


def brand_classes(seed: int) -> Ints:
    """[BRANDS + 1] of -1 and +1, half each (index 0 is the unknown id)."""
    halves = np.repeat([-1, 1], BRANDS // 2)
    return np.concatenate([[0], np.random.default_rng([seed, 0]).permutation(halves)])


def decoupled_worth(seed: int, target: Mapping[str, Ints], seen: Behaviors) -> Floats:
    """s(B_j) for behaviors of the candidate's category A, else 0; s is a brand's class, -1 or +1.

    With m = sum_j worth_j / (1 + n), n relevant behaviors: label ~ Bernoulli(sigmoid(-0.3 + 3 m)). The
    category alone decides which behaviors matter, the brand alone what they say, and the candidate's own
    brand is one that the user likes but hardly has among the relevant behaviors. So vectors that must do both
    let behaviors of like brands crowd the relevant ones out (DARE's case for two sets of tables; check G3).
    """
    said = brand_classes(seed)[seen.ids["brand_id"]].astype(np.float64)
    return of_category(target, seen, said)


def _interference(rng: np.random.Generator, seed: int, users: int) -> Draws:
    """200 behaviors and 4 candidates a user.

    Half of a user's behaviors are in 8 favourite categories and 60 % of 3 favourite brands, else uniform;
    the candidates follow the same law.
    """
    del seed
    categories = rng.integers(1, CATEGORIES + 1, (users, _FAVOURITES))
    brands = rng.integers(1, BRANDS + 1, (users, _BRAND_FAVOURITES))
    history, shown = (
        pairs(
            _loyal(rng, categories, _LOYALTY, CATEGORIES, size)[0],
            "brand_id",
            _loyal(rng, brands, _BRAND_LOYALTY, BRANDS, size)[0],
            BRANDS,
        )
        for size in (BEHAVIORS, CANDIDATES)
    )
    return history, shown, ages(rng, (users, BEHAVIORS))


def _decoupled(rng: np.random.Generator, seed: int, users: int) -> Draws:
    """200 behaviors and 4 candidates a user.

    Half of a user's behaviors, and of the candidates, are in 8 favourite categories. In each of these the
    user leans to one class of brands, drawn once: 85 % of the behaviors there have a brand of it. 60 % of the
    brands are one of the user's 3 favourites of their class. A candidate's brand has a random class and is
    the favourite of it that is rarest among the relevant behaviors, so its class says nothing.
    """
    classes = brand_classes(seed)
    of_class = np.stack([np.nonzero(classes == sign)[0] for sign in (-1, 1)])  # [2, 25], brands
    favourites = rng.integers(1, CATEGORIES + 1, (users, _FAVOURITES))
    liked = of_class[:, rng.integers(0, BRANDS // 2, (users, _BRAND_FAVOURITES))].swapaxes(0, 1)  # [U, 2, 3]
    lean = rng.integers(0, 2, (users, _FAVOURITES))
    category, place = _loyal(rng, favourites, _LOYALTY, CATEGORIES, BEHAVIORS)
    side = np.take_along_axis(lean, place.clip(min=0), axis=1) ^ (rng.random(place.shape) > _LEANING)
    side = np.where(place < 0, rng.integers(0, 2, place.shape), side)
    user = np.arange(users)[:, None]
    favourite = liked[user, side, rng.integers(0, _BRAND_FAVOURITES, side.shape)]
    other = of_class[side, rng.integers(0, BRANDS // 2, side.shape)]
    brand = np.where(rng.random(side.shape) < _BRAND_LOYALTY, favourite, other)
    wanted, _ = _loyal(rng, favourites, _LOYALTY, CATEGORIES, CANDIDATES)
    options = liked[user, rng.integers(0, 2, wanted.shape)]  # [U, M, 3], the favourites of a random class
    relevant = category[:, None] == wanted[..., None]
    held = (brand[:, None, :, None] == options[:, :, None]) & relevant[..., None]
    rarest = np.take_along_axis(options, held.sum(axis=2).argmin(axis=2)[..., None], axis=2)[..., 0]
    history, shown = pairs(category, "brand_id", brand, BRANDS), pairs(wanted, "brand_id", rarest, BRANDS)
    return history, shown, ages(rng, (users, BEHAVIORS))


def _loyal(
    rng: np.random.Generator, favourites: Ints, loyalty: float, ids: int, size: int
) -> tuple[Ints, Ints]:
    """Ids [U, size], of the favourites [U, F] with probability `loyalty`, else uniform; and which favourite
    each one is, -1 where uniform."""
    users, count = favourites.shape
    place = rng.integers(0, count, (users, size))
    place = np.where(rng.random(place.shape) < loyalty, place, -1)
    chosen = np.take_along_axis(favourites, place.clip(min=0), axis=1)
    return np.where(place >= 0, chosen, rng.integers(1, ids + 1, place.shape)), place


interference = OneRequestEach(
    FEATURES, _interference, lambda total: -1.8 + 3.6 * (1 - np.exp(-total(interference_worth) / 4))
)
decoupled = OneRequestEach(
    FEATURES, _decoupled, lambda total: -0.3 + 3 * (total(decoupled_worth) / (1 + total(interference_worth)))
)
