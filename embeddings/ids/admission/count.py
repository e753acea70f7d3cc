"""`count`: an id gets a row when it was seen `admit_count` times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from embeddings.ids.admission.admission import Admission
from embeddings.ids.admission.exact import ExactCounter
from embeddings.ids.admission.sketch import SketchCounter
from embeddings.ids.hashing import Hashes
from embeddings.ids.journal import Journal
from embeddings.ids.rules import IdRules, Ids

# By their names in `ids.<feature>.counter`; a new one gets its line here.
COUNTERS: dict[str, type[Admission]] = {"exact": ExactCounter, "sketch": SketchCounter}


class Count:
    """Counts as `ids.<feature>.counter` says."""

    def __init__(self, rules: IdRules, buckets: range) -> None:
        self._counter = COUNTERS[rules.counter](rules, buckets)

    def admit(
        self, ids: Ids, hashes: Hashes, counts: npt.NDArray[np.int64], step: int, journal: Journal | None
    ) -> npt.NDArray[np.bool_]:
        return self._counter.admit(ids, hashes, counts, step, journal)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        return self._counter.state()

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        self._counter.load(state)
