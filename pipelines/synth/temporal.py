"""Planted signals that live in the age of same-category behaviors: `xor`, `profiles` and `far`.

Ages are drawn in the buckets of `trainer.model.time.age_bucket`, two to every doubling of seconds: bucket b
holds the ages in [2 ** ((b - 1) / 2), 2 ** (b / 2)). The 12 gap buckets of `xor` and `profiles` are b = 25 to
36, from 4,096 seconds (1.1 hours) to 262,143 (3 days), so a model that buckets age reads them exactly; no
bucket holds ages on both sides of the 14 days of `far`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from pipelines.synth.log import DAY, Behaviors, Draws, Floats, Ints, OneRequestEach, of_category

BEHAVIORS, CATEGORIES, GAPS, ITEMS_OF_CATEGORY, CANDIDATES = 60, 20, 12, 5, 4
FIRST_BUCKET: Final = 25
FAR_CATEGORIES, FAR_ITEMS, FAR_CANDIDATES = 1_000, 10, 6
OLD, RECENT = 350, 150
OLD_FROM, RECENT_UNTIL, OLD_UNTIL = 18 * DAY, 12 * DAY, 180 * DAY
_FAVOURITES, _LOYALTY = 8, 0.6


def bucket_start(bucket: Ints) -> Ints:
    """The smallest age in seconds that `age_bucket` puts into a bucket (>= 1)."""
    return np.ceil(2.0 ** ((bucket - 1) / 2)).astype(np.int64)


def gap_of(age: Ints) -> Ints:
    """Seconds -> gap bucket, 0 to 11 where the age is one of `xor` and `profiles`."""
    inner = bucket_start(FIRST_BUCKET + np.arange(1, GAPS))
    return np.asarray(np.searchsorted(inner, age, side="right"))


def xor_worth(seed: int, target: Mapping[str, Ints], seen: Behaviors) -> Floats:
    """TIN's four-way XOR: +1 for a same-category behavior of gap < 4, -1 for one of gap >= 8, else 0.

    With x = sum_j worth_j: label ~ Bernoulli(sigmoid(1.2 x - 0.5)). Category alone or age alone says little
    (an oracle that sees one of them has AUC 0.52 or 0.57), both together 0.822: the semantic-temporal
    correlation that TIN is about (section 3).
    """
    del seed
    gap = gap_of(seen.age)
    sign = np.where(gap < 4, 1.0, np.where(gap >= 8, -1.0, 0.0))
    return of_category(target, seen, sign)


def profiles(seed: int) -> Ints:
    """[CATEGORIES + 1, 12] of -1 and +1: an independent profile over the gap buckets for each category."""
    return np.random.default_rng([seed, 0]).choice([-1, 1], (CATEGORIES + 1, GAPS))


def profile_worth(seed: int, target: Mapping[str, Ints], seen: Behaviors) -> Floats:
    """profile[c_t, gap_j] for same-category behaviors, else 0.

    With x = sum_j worth_j: label ~ Bernoulli(sigmoid(1.25 x - 0.5)). Every target has a curve of its own,
    which narrow shared time tables cannot hold: the regime of target-decoupled position encodings.
    """
    profile = profiles(seed)[target["category_id"], gap_of(seen.age)].astype(np.float64)
    return of_category(target, seen, profile)


def far_worth(seed: int, target: Mapping[str, Ints], seen: Behaviors) -> Floats:
    """1 for same-category behaviors older than 14 days, else 0.

    With n = sum_j worth_j: label ~ Bernoulli(sigmoid(-1.8 + 3.6 (1 - exp(-n / 3)))). What a user does in the
    last 12 days follows other favourites and says nothing: SIM's case for searching the long history.
    """
    del seed
    return of_category(target, seen, np.where(seen.age > 14 * DAY, 1.0, 0.0))


def _gapped(rng: np.random.Generator, seed: int, users: int) -> Draws:
    """60 behaviors and 4 candidates a user; categories and gap buckets are uniform and independent."""
    del seed
    bucket = FIRST_BUCKET + rng.integers(0, GAPS, (users, BEHAVIORS))
    age = -np.sort(-rng.integers(bucket_start(bucket), bucket_start(bucket + 1)), axis=1)
    history = _items(rng, rng.integers(1, CATEGORIES + 1, age.shape), ITEMS_OF_CATEGORY)
    shown = _items(rng, rng.integers(1, CATEGORIES + 1, (users, CANDIDATES)), ITEMS_OF_CATEGORY)
    return history, shown, age


def _far(rng: np.random.Generator, seed: int, users: int) -> Draws:
    """350 behaviors that are 18 to 180 days old, 150 newer ones, and 6 candidates a user.

    In either period 60 % of the behaviors are in 8 favourite categories of its own, the rest in any of 1,000.
    A third of the candidates each comes from the old favourites, the recent ones, and all categories.
    """
    del seed
    old, old_favourites = _period(rng, users, OLD)
    recent, recent_favourites = _period(rng, users, RECENT)
    ages = [rng.integers(OLD_FROM, OLD_UNTIL, old.shape), rng.integers(3_600, RECENT_UNTIL, recent.shape)]
    age = -np.sort(-np.concatenate(ages, axis=1), axis=1)
    history = _items(rng, np.concatenate([old, recent], axis=1), FAR_ITEMS)
    shape = (users, FAR_CANDIDATES)
    place = rng.integers(0, _FAVOURITES, shape)
    sources = [np.take_along_axis(each, place, axis=1) for each in (old_favourites, recent_favourites)]
    sources.append(rng.integers(1, FAR_CATEGORIES + 1, shape))
    shown = _items(rng, np.choose(rng.integers(0, 3, shape), sources), FAR_ITEMS)
    return history, shown, age


def _period(rng: np.random.Generator, users: int, behaviors: int) -> tuple[Ints, Ints]:
    """Categories [U, behaviors] and the favourites [U, 8] that they follow."""
    favourites = rng.integers(1, FAR_CATEGORIES + 1, (users, _FAVOURITES))
    shape = (users, behaviors)
    loyal = np.take_along_axis(favourites, rng.integers(0, _FAVOURITES, shape), axis=1)
    other = rng.integers(1, FAR_CATEGORIES + 1, shape)
    return np.where(rng.random(shape) < _LOYALTY, loyal, other), favourites


def _items(rng: np.random.Generator, category: Ints, items: int) -> dict[str, Ints]:
    """A uniform item of each category, of `items` in each."""
    drawn = rng.integers(1, items + 1, category.shape)
    return {"item_id": (category - 1) * items + drawn, "category_id": category}


_GAPPED = {"item_id": CATEGORIES * ITEMS_OF_CATEGORY + 1, "category_id": CATEGORIES + 1}
xor = OneRequestEach(_GAPPED, _gapped, lambda total: 1.2 * total(xor_worth) - 0.5)
profiled = OneRequestEach(_GAPPED, _gapped, lambda total: 1.25 * total(profile_worth) - 0.5)
far = OneRequestEach(
    {"item_id": FAR_CATEGORIES * FAR_ITEMS + 1, "category_id": FAR_CATEGORIES + 1},
    _far,
    lambda total: -1.8 + 3.6 * (1 - np.exp(-total(far_worth) / 3)),
)
