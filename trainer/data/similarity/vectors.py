"""Vectors of the ids of a feature, in memory or memory-mapped, and how they are found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embeddings.ids.frozen import places
from trainer.data.similarity.directions import Directions

Ints = npt.NDArray[np.int64]
# The place of an id that has no vector.
NOWHERE = -1


@dataclass(frozen=True, eq=False)
class Vectors:
    """The directions of the ids that have a vector.

    Attributes:
        ids: int64 [n], ids of the log, ascending, each once; directions: int16 [n, dim], none of zeros.
    """

    ids: Ints
    directions: Directions

    @property
    def dim(self) -> int:
        return int(self.directions.shape[1])

    def places(self, ids: npt.NDArray[np.integer]) -> Ints:
        """Where the direction of each id lies, `NOWHERE` where it has none."""
        place, there = places(self.ids, ids.astype(np.int64, copy=False))
        return np.where(there, place, NOWHERE)

    def taken(self, place: Ints) -> npt.NDArray[np.float32]:
        """The directions at some places, as float32, which holds their numbers exactly."""
        return np.asarray(self.directions[place], dtype=np.float32)
