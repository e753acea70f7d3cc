"""A planted signal in pre-trained vectors, of items with too few events for ids to tell it: `similar`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Final

import numpy as np

from pipelines.synth.log import Behaviors, Draws, Floats, Ints, OneRequestEach, PlantedLog, Worth, ages

ITEMS, TOPICS, DIM = 60_000, 600, 24
BEHAVIORS, CANDIDATES = 30, 8
# Of a user's behaviors, from the user's own topics; of the candidates, from a topic of the history.
_OWN_TOPICS, _LOYALTY, _NEAR = 3, 0.5, 0.6
# How far items lie from the middle of their topic, and how fast a behavior counts less with the distance.
_SPREAD: Final = (0.2, 1.0)
_REACH: Final = 0.15


@lru_cache(maxsize=2)
def vectors(seed: int) -> Floats:
    """[ITEMS + 1, DIM], of length 1; row 0 is zero. Item i has the topic i mod TOPICS."""
    rng = np.random.default_rng([seed, 0])
    topic = rng.normal(size=(TOPICS, DIM))
    topic /= np.linalg.norm(topic, axis=1, keepdims=True)
    far = rng.uniform(*_SPREAD, (ITEMS + 1, 1)) / DIM**0.5
    found = topic[np.arange(ITEMS + 1) % TOPICS] + far * rng.normal(size=(ITEMS + 1, DIM))
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    found[0] = 0
    return np.asarray(found)


def worth(seed: int, target: Mapping[str, Ints], seen: Behaviors) -> Floats:
    """exp((cos(v_c, v_j) - 1) / 0.15), of the vectors v of the candidate and of behavior j.

    With x = sum_j worth_j: label ~ Bernoulli(sigmoid(-2.5 + 5 (1 - exp(-2 x)))). What counts is whether there
    is a behavior with nearly the same vector.
    """
    of_item = vectors(seed)
    cosine = (of_item[seen.ids["item_id"]] * of_item[target["item_id"]]).sum(axis=-1)
    return np.asarray(np.exp((cosine - 1) / _REACH))


def _logits(total: Callable[[Worth], Floats]) -> Floats:
    return np.asarray(-2.5 + 5 * (1 - np.exp(-2 * total(worth))))


def _draw(rng: np.random.Generator, seed: int, users: int) -> Draws:
    """30 behaviors and 8 candidates a user: half of the behaviors have one of 3 topics of the user."""
    del seed
    shape = (users, BEHAVIORS)
    own = rng.integers(0, TOPICS, (users, _OWN_TOPICS))
    liked = own[np.arange(users)[:, None], rng.integers(0, _OWN_TOPICS, shape)]
    topic = np.where(rng.random(shape) < _LOYALTY, liked, rng.integers(0, TOPICS, shape))
    shown = (users, CANDIDATES)
    near = topic[np.arange(users)[:, None], rng.integers(0, BEHAVIORS, shown)]
    wanted = np.where(rng.random(shown) < _NEAR, near, rng.integers(0, TOPICS, shown))
    history, candidates = (_items(rng, each) for each in (topic, wanted))
    return {"item_id": history}, {"item_id": candidates}, ages(rng, shape)


def _items(rng: np.random.Generator, topic: Ints) -> Ints:
    """Items of topics, each as likely; topic 0 has the items TOPICS, 2 TOPICS and so on."""
    first = np.where(topic == 0, TOPICS, topic)
    return np.asarray(first + TOPICS * rng.integers(0, ITEMS // TOPICS, topic.shape))


_planted = OneRequestEach({"item_id": ITEMS + 1}, _draw, _logits, taxonomy=())


def similar(seed: int, users: int) -> PlantedLog:
    """The log of a seed, with the vectors of its items."""
    return replace(_planted(seed, users), vectors=vectors(seed))
