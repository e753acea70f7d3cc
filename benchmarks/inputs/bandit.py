"""A simulated bandit whose player knows what a snapshot knows: means and a posterior of logits.

Items have a vector of 4 weights each. In every round a user with a context x (a 1, and 3 normal numbers) is
shown one of some items, and clicks with sigmoid(w_item . x - 1). The player fits a Bayesian logistic
regression every 25 rounds by Newton's method, with the curvature of `trainer.snapshot.laplace`.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from trainer.snapshot.laplace import curvature

WIDTH: Final = 4
_BASE, _PRIOR, _EVERY = -1.0, 1.0, 25
Floats = npt.NDArray[np.float64]
RULES: Final = ("greedy", "ucb", "thompson")
# What a player chooses among: (all items, those that a round offers, by chance).
OFFERS: Final = {"all of 30 items": (30, 30), "8 of 40 items": (40, 8)}


def regrets(rule: str, seed: int, rounds: int, offers: tuple[int, int]) -> Floats:
    """[rounds], the best item's probability of a click less that of the item shown.

    All rules meet the same users and items.
    """
    items, shown = offers
    world, own = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    truth = world.normal(size=(items, WIDTH))
    found, covariance = np.zeros((items, WIDTH)), np.stack([np.eye(WIDTH) / _PRIOR] * items)
    seen: list[list[tuple[Floats, float]]] = [[] for _ in range(items)]
    lost, changed = np.zeros(rounds), set[int]()
    for number in range(rounds):
        x = np.r_[1.0, world.normal(size=WIDTH - 1)]
        offered, chance = world.choice(items, shown, replace=False), world.random()
        chosen = offered[np.argmax(_scores(rule, x, found[offered], covariance[offered], own))]
        p = 1 / (1 + np.exp(-(truth[offered] @ x + _BASE)))
        mine = p[offered == chosen][0]
        lost[number] = p.max() - mine
        seen[chosen].append((x, float(chance < mine)))
        changed.add(int(chosen))
        if number % _EVERY == 0:
            for item in changed:
                found[item], covariance[item] = _fitted(seen[item], found[item])
            changed.clear()
    return lost


def _scores(
    rule: str, x: Floats, found: Floats, covariance: npt.NDArray[np.float64], rng: np.random.Generator
) -> Floats:
    logits = found @ x
    deviation = np.sqrt(np.einsum("w,swv,v->s", x, covariance, x))
    if rule == "ucb":
        logits = logits + deviation
    elif rule == "thompson":
        # Items have weights of their own: their draws are independent.
        logits = logits + deviation * rng.standard_normal(len(logits))
    return np.asarray(logits)


def _fitted(seen: list[tuple[Floats, float]], start: Floats) -> tuple[Floats, Floats]:
    """The most probable weights, by a few steps of Newton's method, and their covariance."""
    x, y = np.stack([each for each, _ in seen]), np.array([click for _, click in seen])
    weights, ones = start, np.ones(len(y))
    for _ in range(4):
        logits = x @ weights + _BASE
        precision = curvature(x, logits, ones) + _PRIOR * np.eye(WIDTH)
        slope = x.T @ (y - 1 / (1 + np.exp(-logits))) - _PRIOR * weights
        weights = weights + np.linalg.solve(precision, slope)
    return weights, np.asarray(np.linalg.inv(precision))
