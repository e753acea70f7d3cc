"""Numbers that are as good as random and follow from an id alone, the same on every machine."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]


def hashed(numbers: npt.NDArray[np.int64 | np.uint64]) -> Hashes:
    """A number from 0 to 2^64 - 1 for each (SplitMix64, Steele et al. 2014); different ids have different
    ones."""
    z = np.asarray(numbers).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Hashes = z ^ (z >> np.uint64(31))
    return mixed
