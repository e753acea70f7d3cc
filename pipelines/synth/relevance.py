"""Planted relevance: a candidate is clicked for recent behaviors of its own or its partner category.

    z = b + 3 sum_j w(c_t, c_j) exp(-(rank_j - 1) / 25) + q_item        click ~ Bernoulli(sigmoid(z))

over the newest 200 behaviors j; rank 1 is the newest. w = 1 for the same category, 0.5 for the partner (a
fixed permutation of the categories: it must be learned, it cannot be matched), else 0. q ~ N(0, 0.3); b makes
a third of all candidates clicks. The layout of requests is that of DARE's Taobao data (thuml/DARE,
preprocessing): a user's events at distance 93, 88, ..., 3 from the end are 19 requests to train on, the last
but one is for validation, the last for test; three candidates each.

Published code on a log of this kind (one pass, batch 2,048, d = 16, K = 20, L = 200): DARE's test AUC 0.9136,
TWIN's 0.8911; its oracle had 0.97129.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from pipelines.synth.log import (
    DAY,
    START,
    Behaviors,
    Floats,
    Ints,
    PlantedLog,
    PlantedSplit,
    draw_labels,
    sigmoid,
)

ITEMS: Final = 50_000
CATEGORIES: Final = 500
LENGTH: Final = 200
DISTANCES: Final = {"train": tuple(range(93, 2, -5)), "validation": (2,), "test": (1,)}
CANDIDATES: Final = 3
CLICKED: Final = 1 / 3
_EVENTS: Final = LENGTH + max(DISTANCES["train"])
_FAVOURITES, _LOYALTY, _DRIFT, _NEAR = 8, 0.7, 0.015, 60
_STRENGTH, _DECAY, _QUALITY = 3.0, 25.0, 0.3


@dataclass(frozen=True)
class World:
    """What all users share; index 0 stands for the unknown id and is never drawn.

    Attributes:
        category: [ITEMS + 1], of an item; popularity: [ITEMS + 1], 1 / rank in random order, sums to 1.
        partner: [CATEGORIES + 1], a permutation; quality: [ITEMS + 1], q.
    """

    category: Ints
    popularity: Floats
    partner: Ints
    quality: Floats


@lru_cache(maxsize=2)
def world(seed: int) -> World:
    """The world of a seed, the same for any number of users."""
    rng = np.random.default_rng([seed, 0])
    category = np.r_[0, rng.integers(1, CATEGORIES + 1, ITEMS)]
    popularity = np.r_[0, rng.permutation(1 / np.arange(1, ITEMS + 1))]
    partner = np.r_[0, 1 + rng.permutation(CATEGORIES)]
    quality = np.r_[0, rng.normal(0, _QUALITY, ITEMS)]
    return World(category, popularity / popularity.sum(), partner, quality)


def worth(seed: int, target: Mapping[str, Ints], seen: Behaviors) -> Floats:
    """w(c_t, c_j) exp(-(rank_j - 1) / 25); see `Worth` for the shapes."""
    wanted = target["category_id"]
    partner = world(seed).partner[wanted]
    held = seen.ids["category_id"]
    weight = np.where(held == wanted, 1.0, np.where(held == partner, 0.5, 0.0))
    return np.asarray(weight * np.exp(-(seen.rank - 1) / _DECAY))


def generate(seed: int, users: int) -> PlantedLog:
    """The log of a seed: `users` users, 63 candidates each."""
    rng, shared = np.random.default_rng([seed, 1]), world(seed)
    items = _events(rng, shared, users)
    gaps = 60 + rng.exponential(DAY / 8, (users, _EVENTS)).astype(np.int64)
    when = START + np.cumsum(gaps, axis=1)
    ends = {
        split: np.array([_EVENTS - distance for distance in distances])
        for split, distances in DISTANCES.items()
    }
    shown = {split: _candidates(rng, shared, items, end) for split, end in ends.items()}
    logits = {split: _logits(seed, shared, items, ends[split], shown[split]) for split in ends}
    everything = np.concatenate([logit.reshape(-1) for logit in logits.values()])
    # b, by bisection: the mean probability is a third.
    bias, high = -30.0, 30.0
    for _ in range(60):
        middle = (bias + high) / 2
        bias, high = (bias, middle) if sigmoid(everything + middle).mean() > CLICKED else (middle, high)
    first = {"train": 0, "validation": len(DISTANCES["train"]), "test": len(DISTANCES["train"]) + 1}
    splits = {}
    for split, end in ends.items():
        probability = sigmoid(logits[split] + bias)
        seen = slice(0, int(end.max()))
        splits[split] = PlantedSplit(
            user_id=np.arange(1, users + 1),
            history=_features(shared, items[:, seen]),
            history_time=when[:, seen],
            request_id=np.tile(first[split] + np.arange(end.size), (users, 1)),
            request_time=when[:, end],
            history_end=np.tile(end, (users, 1)),
            candidates=_features(shared, shown[split]),
            probabilities={"click": probability},
            labels={"click": draw_labels(rng, probability)},
        )
    return PlantedLog({"item_id": ITEMS + 1, "category_id": CATEGORIES + 1}, ("category_id",), splits)


def _features(shared: World, items: Ints) -> dict[str, Ints]:
    return {"item_id": items, "category_id": shared.category[items]}


def _events(rng: np.random.Generator, shared: World, users: int) -> Ints:
    """Item ids [U, 293]: 70 % of a user's events from 8 favourite categories, 30 % by popularity.

    Before each event one favourite changes with probability 0.015.
    """
    draw = _Popular(shared)
    favourites = rng.integers(1, CATEGORIES + 1, (users, _FAVOURITES))
    everyone = np.arange(users)
    events = np.zeros((users, _EVENTS), dtype=np.int64)
    for event in range(_EVENTS):
        moved = np.nonzero(rng.random(users) < _DRIFT)[0]
        favourites[moved, rng.integers(0, _FAVOURITES, moved.size)] = rng.integers(
            1, CATEGORIES + 1, moved.size
        )
        chosen = favourites[everyone, rng.integers(0, _FAVOURITES, users)]
        loyal = rng.random(users) < _LOYALTY
        events[:, event] = np.where(loyal, draw.within(rng, chosen), draw.any(rng, (users,)))
    return events


def _candidates(rng: np.random.Generator, shared: World, items: Ints, end: Ints) -> Ints:
    """Item ids [U, R, 3]: half from the category of one of the newest 60 behaviors, half by popularity."""
    draw, users = _Popular(shared), items.shape[0]
    shape = (users, end.size, CANDIDATES)
    place = end[None, :, None] - 1 - rng.integers(0, _NEAR, shape)
    near = shared.category[items[np.arange(users)[:, None, None], place]]
    return np.where(rng.random(shape) < 0.5, draw.within(rng, near), draw.any(rng, shape))


def _logits(seed: int, shared: World, items: Ints, end: Ints, shown: Ints) -> Floats:
    """z without b, [U, R, 3]."""
    z = shared.quality[shown]
    rank = np.arange(LENGTH, 0, -1)
    for request, stop in enumerate(end):
        held = {"category_id": shared.category[items[:, None, stop - LENGTH : stop]]}
        target = {"category_id": shared.category[shown[:, request, :, None]]}
        z[:, request] += _STRENGTH * worth(seed, target, Behaviors(held, rank, rank)).sum(axis=-1)
    return z


class _Popular:
    """Draws items in proportion to popularity, from all or within given categories."""

    def __init__(self, shared: World) -> None:
        self.order = np.argsort(shared.category, kind="stable")
        self.upto = np.cumsum(shared.popularity[self.order])
        last = np.searchsorted(shared.category[self.order], np.arange(CATEGORIES + 1), side="right") - 1
        self.high = self.upto[last]
        self.low = np.r_[0.0, self.high[:-1]]

    def any(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Ints:
        return self._at(rng.random(shape) * self.upto[-1])

    def within(self, rng: np.random.Generator, category: Ints) -> Ints:
        low, high = self.low[category], self.high[category]
        return self._at(low + rng.random(category.shape) * (high - low))

    def _at(self, place: Floats) -> Ints:
        found = np.searchsorted(self.upto, place, side="right")
        return np.asarray(self.order[found.clip(max=self.order.size - 1)])
