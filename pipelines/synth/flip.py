"""A stream whose best item becomes the worst at a known time, among items that are born and die: `flip`.

Nine days. The first six are the split `train`, the seventh is `validation`, and the last two are `test`; the
flip is in the middle of `test`. Requests come evenly over time, one a user. Ids of items are raw: any 64-bit
integers. `tandemrec windows` makes a stream of the log.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from embeddings.ids.hashing import hashed
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
    split_users,
)

FLIP: Final = START + 8 * DAY
"""The unix second of the flip."""
BEHAVIORS, CANDIDATES, CATEGORIES = 10, 5, 8
_DAYS = {"train": (0, 6), "validation": (6, 7), "test": (7, 9)}
# Places of items: one dies in each, and the next is born, once a `_LIFE`, one place after the other.
_PLACES, _LIFE = 60, 2 * DAY
_OLDEST = 3 * DAY  # of a behavior, before its request
_STARS, _STRENGTH, _BASE = 2, 2.0, -0.5
# Of a behavior: how often it is with one of the two stars.
_STAR_SHARE = 0.2
# Items before START have lived, too: no generation is below zero.
_GENERATIONS = 10


def star_ids(seed: int) -> tuple[int, int]:
    """The item that is best before `FLIP`, and the one that is best from then on."""
    first, second = _raw_ids(seed, np.arange(_STARS)).tolist()
    return first, second


def worth(seed: int, target: Mapping[str, Ints], seen: Behaviors) -> Floats:
    """0: only the candidate's item and the time matter.

    An ordinary item has a quality of its own, uniform in [-1, 1]. The better star has 2, the other one -2,
    and at `FLIP` they change places. label ~ Bernoulli(sigmoid(quality - 0.5)).
    """
    del seed, target
    return np.zeros(seen.age.shape)


def flip(seed: int, users: int) -> PlantedLog:
    """The log of a seed with `users` users in its first six days."""
    rng, splits = np.random.default_rng([seed, 1]), {}
    for split, (first, count) in split_users(users).items():
        begin, end = (START + day * DAY for day in _DAYS[split])
        request_time = np.sort(rng.integers(begin, end, (count, 1)), axis=0)
        history_time = np.sort(request_time - rng.integers(1, _OLDEST, (count, BEHAVIORS)), axis=1)
        acted = _alive(rng, history_time)
        acted = np.where(rng.random(acted.shape) < _STAR_SHARE, rng.integers(0, _STARS, acted.shape), acted)
        shown_time = np.repeat(request_time, CANDIDATES, axis=1)
        shown = _alive(rng, shown_time)
        shown[:, :_STARS] = np.arange(_STARS)
        probability = sigmoid(_quality(seed, shown, shown_time) + _BASE)[:, None, :]
        splits[split] = PlantedSplit(
            user_id=np.arange(first, first + count),
            history=_features(seed, acted),
            history_time=history_time,
            request_id=np.ones((count, 1), dtype=np.int64),
            request_time=request_time,
            history_end=np.full((count, 1), BEHAVIORS),
            candidates={name: ids[:, None, :] for name, ids in _features(seed, shown).items()},
            probabilities={"click": probability},
            labels={"click": draw_labels(rng, probability)},
        )
    before, after = star_ids(seed)
    facts = {"flip": FLIP, "best_before": before, "best_after": after}
    rows = {"item_id": 1, "category_id": CATEGORIES + 1}
    return PlantedLog(rows, ("category_id",), splits, raw=frozenset({"item_id"}), facts=facts)


def _alive(rng: np.random.Generator, time: Ints) -> Ints:
    """The number of an ordinary item that lives at each time; the stars have the first numbers."""
    place = rng.integers(0, _PLACES, time.shape)
    generation = (time - START + place * (_LIFE // _PLACES)) // _LIFE + _GENERATIONS
    return _STARS + generation * _PLACES + place


def _quality(seed: int, number: Ints, time: Ints) -> Floats:
    """What an item adds to the logit at a time."""
    uniform = _draws(seed, number, 1).astype(np.float64) / 2.0**63 - 1
    star = np.where((number == 0) == (time < FLIP), _STRENGTH, -_STRENGTH)
    return np.where(number < _STARS, star, uniform)


def _features(seed: int, number: Ints) -> dict[str, Ints]:
    category = (_draws(seed, number, 2) % np.uint64(CATEGORIES)).astype(np.int64) + 1
    return {"item_id": _raw_ids(seed, number), "category_id": category}


def _raw_ids(seed: int, number: Ints) -> Ints:
    return _draws(seed, number, 0).view(np.int64)


def _draws(seed: int, number: Ints, purpose: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    """A uniform number from 0 to 2^64 - 1 for each item; those of two purposes are independent."""
    return hashed(hashed(number) ^ hashed(np.array([seed * 4 + purpose + (1 << 40)])))
