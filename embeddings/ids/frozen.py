"""Raw ids to rows where nothing changes any more: an ascending list of ids, and their rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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
        place, here = places(self.ids, wanted)
        rows[here] = self.rows[place[here]]
        return rows

    def knows(self, wanted: Ids) -> npt.NDArray[np.bool_]:
        """Whether each id has a row of its own."""
        return places(self.ids, wanted)[1]


def places(ids: Ids, wanted: Ids) -> tuple[Int64s, npt.NDArray[np.bool_]]:
    """Where each id stands among ascending ones, and whether it is there; else its place says nothing."""
    if not ids.size:
        return np.zeros(wanted.size, dtype=np.int64), np.zeros(wanted.size, dtype=np.bool_)
    place = np.searchsorted(ids, wanted).clip(max=ids.size - 1)
    return place, ids[place] == wanted
