"""`chance`: each sighting of an id lets it in with the same probability."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from embeddings.ids.hashing import Hashes, hashed
from embeddings.ids.journal import Journal
from embeddings.ids.rules import IdRules, Ids

Int64s = npt.NDArray[np.int64]
# Probabilities are so many parts, in 32 bits.
_ONE = 1 << 32


class Chance:
    """Draws once for all sightings of an id in a step, by the id, the seed and the number of the step.

    n sightings with probability p let an id in with probability 1 - (1 - p)^n. Integers hold it, in parts of
    2^32, so that all machines agree; roundings add up to at most n / 2^30. Has no state.
    """

    def __init__(self, rules: IdRules, buckets: range) -> None:
        self._seed, self._stays_out = rules.seed, _ONE - max(1, round(rules.admit_chance * _ONE))

    def admit(
        self, ids: Ids, hashes: Hashes, counts: Int64s, step: int, journal: Journal | None
    ) -> npt.NDArray[np.bool_]:
        of_step = hashed(hashed(np.array([self._seed])) + np.uint64(step))
        draws = (hashed(hashes ^ of_step) >> np.uint64(32)).astype(np.int64)
        admitted: npt.NDArray[np.bool_] = draws < _ONE - _power(self._stays_out, counts)
        return admitted

    def state(self) -> dict[str, npt.NDArray[Any]]:
        return {}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        pass


def _power(base: int, exponents: Int64s) -> Int64s:
    """Parts of `_ONE`, from squares of the base, each rounded down."""
    power = np.full(exponents.size, _ONE, dtype=np.uint64)
    for bit in range(int(exponents.max(initial=0)).bit_length()):
        times = np.where(exponents >> bit & 1, np.uint64(base), np.uint64(_ONE))
        # A product of the two ones does not fit 64 bits.
        power = np.where(power == _ONE, times, power * times >> np.uint64(32))
        base = base * base >> 32
    return power.astype(np.int64)
