"""A planted signal whose smallest field collapses the dimensions of the others' embeddings: `collapse`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from pipelines.synth.log import Behaviors, Draws, Floats, Ints, OneRequestEach, ages

RANK, BEHAVIORS, CANDIDATES = 4, 2, 8
# field -> its ids. A user has three fields, which all behaviors of the user carry, and a candidate has three.
OF_USERS: Final = {"topic_id": 3, "source_id": 60, "author_id": 60}
OF_CANDIDATES: Final = {"format_id": 60, "brand_id": 60, "place_id": 60}
FEATURES: Final = {name: ids + 1 for name, ids in (OF_USERS | OF_CANDIDATES).items()}
# Each of the two interactions pairs the fields in a way of its own.
INTERACTIONS: Final = (
    (("topic_id", "format_id"), ("source_id", "brand_id"), ("author_id", "place_id")),
    (("topic_id", "brand_id"), ("source_id", "place_id"), ("author_id", "format_id")),
)
STRENGTH: Final = 2.5


def vectors(seed: int, interaction: int) -> dict[str, Floats]:
    """field -> [ids + 1, RANK]: what an interaction reads of a field. Columns have mean 0 and deviation 1."""
    rng = np.random.default_rng([seed, 0, interaction])
    drawn = {name: rng.normal(size=(rows - 1, RANK)) for name, rows in FEATURES.items()}
    return {name: np.pad((v - v.mean(axis=0)) / v.std(axis=0), ((1, 0), (0, 0))) for name, v in drawn.items()}


def worth(seed: int, target: Mapping[str, Ints], seen: Behaviors) -> Floats:
    """sum_k sum_{(a, b) in pairs_k} <v^k_a, v^k_b> / (2 sqrt(24)); field a is the user's, b the candidate's.

    With x = sum_j worth_j, near N(0, 1): label ~ Bernoulli(sigmoid(-1 + 2.5 x)). The sum of two interactions
    of rank 4 over six fields. As in an XOR no field says anything alone: its vectors have mean 0. Whatever
    meets the topic, of which there are three, can gain no more than two dimensions from it; that is the
    dimensional collapse of a single embedding that Multi-Embedding is about (arXiv 2310.04400).
    """
    total: Floats = np.zeros(seen.age.shape)
    for interaction, pairs in enumerate(INTERACTIONS):
        v = vectors(seed, interaction)
        for user, candidate in pairs:
            total = total + (v[user][seen.ids[user]] * v[candidate][target[candidate]]).sum(axis=-1)
    fields = sum(map(len, INTERACTIONS))
    return np.asarray(total / (BEHAVIORS * (fields * RANK) ** 0.5))


def _draw(rng: np.random.Generator, seed: int, users: int) -> Draws:
    """2 behaviors, which are alike, and 8 candidates a user; all ids are uniform."""
    del seed
    user = {name: rng.integers(1, ids + 1, (users, 1)) for name, ids in OF_USERS.items()}
    history = {name: np.repeat(ids, BEHAVIORS, axis=1) for name, ids in user.items()}
    shown = {name: rng.integers(1, ids + 1, (users, CANDIDATES)) for name, ids in OF_CANDIDATES.items()}
    return history, shown, ages(rng, (users, BEHAVIORS))


collapse = OneRequestEach(FEATURES, _draw, lambda total: -1 + STRENGTH * total(worth), taxonomy=())
