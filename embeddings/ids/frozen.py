"""Raw ids to rows where nothing changes any more: an ascending list of ids, and their rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embeddings.ids.bucket_map import Int64s
from embeddings.ids.hashing import hashed
from embeddings.ids.rules import IdRules, Ids


@dataclass(frozen=True)
class FrozenIds:
    """The ids that have a row; arrays may be memory-mapped.

    Attributes:
        rules: of the feature; ids: ascending, each once; rows: of each.
    """

    rules: IdRules
    ids: Ids
    rows: Int64s

    def look_up(self, wanted: Ids) -> Int64s:
        """The row of each id, which may repeat; that of others is a shared one, as in training."""
        rows = self.rules.shared_row(hashed(wanted))
        if self.ids.size:
            place = np.searchsorted(self.ids, wanted).clip(max=self.ids.size - 1)
            here = self.ids[place] == wanted
            rows[here] = self.rows[place[here]]
        return rows

    def knows(self, wanted: Ids) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Whether each id has a row of its own."""
        if not self.ids.size:
            return np.zeros(wanted.size, dtype=np.bool_)
        place = np.searchsorted(self.ids, wanted).clip(max=self.ids.size - 1)
        found: np.ndarray[tuple[int], np.dtype[np.bool_]] = self.ids[place] == wanted
        return found
