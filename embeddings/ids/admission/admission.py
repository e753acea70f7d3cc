"""What every rule of admission offers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from embeddings.ids.hashing import Hashes
from embeddings.ids.journal import Journal
from embeddings.ids.rules import IdRules, Ids


class Admission(Protocol):
    """Says which of the ids without a row may have one, for the ids of some buckets.

    Its answers depend on the ids, how often each was seen and the number of the step, and neither on their
    order nor on how the buckets are dealt to ranks.
    """

    def __init__(self, rules: IdRules, buckets: range) -> None: ...

    def admit(
        self, ids: Ids, hashes: Hashes, counts: npt.NDArray[np.int64], step: int, journal: Journal | None
    ) -> npt.NDArray[np.bool_]:
        """[n], whether each may have a row.

        Args:
            ids: without a row, each once; counts: sightings of each in this step that count, maybe none.
            step: number of the step; journal: told of everything that changes.
        """

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """What a checkpoint keeps.

        Arrays have the same number of entries for each bucket, bucket after bucket. Or, where one of them is
        called `ids`, all have an entry for each of these ids, ascending. Equal states have equal bytes.
        """

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take up what `state` gave, of the very same buckets; begin anew where it is empty."""
