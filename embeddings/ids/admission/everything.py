"""`all`: every id gets a row when it is first seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from embeddings.ids.hashing import Hashes
from embeddings.ids.journal import Journal
from embeddings.ids.rules import IdRules, Ids


class Everything:
    """Has no state."""

    def __init__(self, rules: IdRules, buckets: range) -> None:
        pass

    def admit(
        self, ids: Ids, hashes: Hashes, counts: npt.NDArray[np.int64], step: int, journal: Journal | None
    ) -> npt.NDArray[np.bool_]:
        """Those that were seen in a way that counts."""
        return counts > 0

    def state(self) -> dict[str, npt.NDArray[Any]]:
        return {}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        pass
