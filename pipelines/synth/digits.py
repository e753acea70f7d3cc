"""Planted signals of a number, of which both order and a digit matter: `digits` and `digits_number`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import numpy as np

from pipelines.synth.log import Behaviors, Draws, Floats, Ints, OneRequestEach, PlantedLog, ages
from trainer.log.encoders.buckets import Buckets
from trainer.log.encoders.code import code_of, number_of
from trainer.log.encoders.mnse import Mnse
from trainer.log.encoders.table import AnyEncoder

BEHAVIORS, CANDIDATES, CATEGORIES = 20, 8, 8
LARGEST: Final = 9_999
DIGITS: Final = Mnse(kind="mnse", range=(0, LARGEST))
# As many weights as `DIGITS` has, where its three tables are a third as wide: intervals of equal ratios.
EDGES: Final = tuple(int(edge) for edge in np.unique(np.geomspace(60, 9_500, 33).round()))
_LEVELS, _SPREAD, _LOYALTY = (100.0, 6_000.0), 0.35, 0.7


def worth(seed: int, target: Mapping[str, Ints], seen: Behaviors) -> Floats:
    """(1 if the prices' last digits are equal, else 0, + sign(p_behavior - p_candidate) / 4) / 20.

    With x = sum_j worth_j over 20 behaviors: label ~ Bernoulli(sigmoid(-1.5 + 6 x)). The last digit cannot be
    told from an interval, and the order of two prices not from a digit that is an id like any other.
    """
    del seed
    behavior, candidate = (number_of(ids["price"]).value for ids in (seen.ids, target))
    same = behavior % 10 == candidate % 10
    return np.asarray((same + np.sign(behavior - candidate) / 4) / BEHAVIORS)


def _draw(rng: np.random.Generator, seed: int, users: int) -> Draws:
    """20 behaviors and 8 candidates a user; categories are uniform and say nothing.

    Users have a level of prices, uniform in its logarithm, around which their behaviors lie, and a last digit
    that 70 % of these have. A candidate's price is uniform in its logarithm, and half of them end in the
    user's digit.
    """
    del seed
    digit = rng.integers(0, 10, (users, 1))

    def prices(of: Floats, loyalty: float) -> Ints:
        drawn = np.clip(of.round(), 10, LARGEST).astype(np.int64)
        own = rng.random(drawn.shape) < loyalty
        return np.where(own, drawn - drawn % 10 + digit, drawn)

    low, high = np.log(_LEVELS)
    level = rng.uniform(low, high, (users, 1))
    bought = prices(np.exp(level + _SPREAD * rng.normal(size=(users, BEHAVIORS))), _LOYALTY)
    shown = prices(np.exp(rng.uniform(low, high, (users, CANDIDATES))), 0.5)
    history, candidates = (
        {
            "category_id": rng.integers(1, CATEGORIES + 1, price.shape),
            "price": code_of(price),
            "price_band": code_of(price),
        }
        for price in (bought, shown)
    )
    return history, candidates, ages(rng, bought.shape)


_GENERATE = OneRequestEach(
    {"category_id": CATEGORIES + 1, "price": 1, "price_band": 1},
    _draw,
    lambda total: -1.5 + 6 * total(worth),
)


def digits(seed: int, users: int) -> PlantedLog:
    """The log with the price as digits, and again as intervals, for models to choose from."""
    encoders: dict[str, AnyEncoder] = {"price": DIGITS, "price_band": Buckets(kind="buckets", edges=EDGES)}
    return replace(_GENERATE(seed, users), encoders=encoders)


def digits_number(seed: int, users: int) -> PlantedLog:
    """The same log with the price itself as a number of candidates, in place of both."""
    log = _GENERATE(seed, users)
    splits = {}
    for name, part in log.splits.items():
        price = number_of(part.candidates["price"]).value.astype(np.float32)
        history, shown = ({"category_id": side["category_id"]} for side in (part.history, part.candidates))
        splits[name] = replace(part, history=history, candidates=shown, numbers={"price": price})
    return replace(log, features={"category_id": CATEGORIES + 1}, splits=splits)
