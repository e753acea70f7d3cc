"""Clicks whose noise is known, of candidates with numbers and of items that are rarely seen: `uncertain`."""

from __future__ import annotations

from collections.abc import Mapping
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
    ages,
    draw_labels,
    sigmoid,
    split_users,
)

NUMBERS, ITEMS, BEHAVIORS, CANDIDATES = 16, 2_000, 4, 4
PLAIN: Final = ("click", "buy", "share", "save")
"""The tasks whose logits the numbers alone decide."""
OF_ITEMS: Final = "like"
"""The task whose logit the candidate's item decides, too."""
_BASE, _STRENGTH, _POWER = -0.5, 0.3, 1.1


def weights(seed: int) -> dict[str, Floats]:
    """Task -> what each number is multiplied by, normal with the deviation 0.3."""
    drawn = np.random.default_rng([seed, 0]).normal(0, _STRENGTH, (len(PLAIN) + 1, NUMBERS))
    return dict(zip((*PLAIN, OF_ITEMS), drawn, strict=True))


def qualities(seed: int) -> Floats:
    """What each item adds to the logit of `OF_ITEMS`, standard normal; [ITEMS + 1], that of the id 0 is 0."""
    return np.pad(np.random.default_rng([seed, 2]).normal(0, 1, ITEMS), (1, 0))


def worth(seed: int, target: Mapping[str, Ints], seen: Behaviors) -> Floats:
    """0: behaviors say nothing.

    A candidate has 16 numbers x = sign(z) (exp |z| - 1), with z standard normal: a model that reads
    sign(x) log(1 + |x|) sees z itself. label ~ Bernoulli(sigmoid(-0.5 + w . z)), with a w for each task; the
    task `like` adds the quality of the candidate's item. Item n of 2,000 is shown in proportion to n^-1.1, so
    that most items are hardly ever seen in training.
    """
    del seed, target
    return np.zeros(seen.age.shape)


def uncertain(seed: int, users: int) -> PlantedLog:
    """The log of a seed with `users` users to train on, one request each."""
    rng, splits = np.random.default_rng([seed, 1]), {}
    popularity = np.arange(1, ITEMS + 1) ** -_POWER
    for split, (first, count) in split_users(users).items():
        shape = count, 1, CANDIDATES
        age = ages(rng, (count, BEHAVIORS))
        request_time = START + 365 * DAY + rng.integers(0, 30 * DAY, (count, 1))
        z = rng.normal(size=(*shape, NUMBERS))
        item = rng.choice(ITEMS, shape, p=popularity / popularity.sum()) + 1
        logits = {task: _BASE + z @ w for task, w in weights(seed).items()}
        logits[OF_ITEMS] = logits[OF_ITEMS] + qualities(seed)[item]
        probabilities = {task: sigmoid(logit) for task, logit in logits.items()}
        splits[split] = PlantedSplit(
            user_id=np.arange(first, first + count),
            history={"item_id": rng.integers(1, ITEMS + 1, (count, BEHAVIORS))},
            history_time=request_time - age,
            request_id=np.ones((count, 1), dtype=np.int64),
            request_time=request_time,
            history_end=np.full((count, 1), BEHAVIORS),
            candidates={"item_id": item},
            probabilities=probabilities,
            labels={task: draw_labels(rng, p) for task, p in probabilities.items()},
            numbers={f"z{place:02d}": _read_as(z[..., place]) for place in range(NUMBERS)},
        )
    return PlantedLog({"item_id": ITEMS + 1}, (), splits)


def _read_as(z: Floats) -> Floats:
    """The number of which a model makes z."""
    return np.sign(z) * np.expm1(np.abs(z))
