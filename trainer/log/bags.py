"""Ids of consecutive things, one each or several: what a column of ids is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32 | np.int64]
# Consecutive elements [start, stop), both given, or elements one by one.
Chosen = slice | Ints


def offsets_of(lengths: Sequence[int] | Ints) -> Ints:
    """Where each of consecutive pieces begins, and where the last one ends: int64 [n + 1]."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(np.asarray(lengths, dtype=np.int64), out=offsets[1:])
    return offsets


@dataclass(frozen=True)
class Bags:
    """Ids of consecutive behaviors, candidates or requests: one each, or several.

    Attributes:
        values: the ids; offsets: [n + 1] where the ids of each begin, None with one id each.
    """

    values: Ids
    offsets: Ints | None = None

    @staticmethod
    def of_lengths(values: Ids, lengths: Sequence[int] | Ints | None) -> Bags:
        """Bags of so many ids each; None: of one each."""
        return Bags(values, None if lengths is None else offsets_of(lengths))

    @property
    def size(self) -> int:
        """The number of bags: of behaviors, candidates or requests."""
        return self.values.size if self.offsets is None else self.offsets.size - 1

    @property
    def lengths(self) -> Ints:
        """Ids of each bag: [n]."""
        return np.ones(self.values.size, dtype=np.int64) if self.offsets is None else np.diff(self.offsets)

    def part(self, chosen: slice) -> Bags:
        """Consecutive bags as int64 in memory of their own: a view would keep all of the ids in memory."""
        values, lengths = self.select(chosen)
        return Bags.of_lengths(values.astype(np.int64), None if self.offsets is None else lengths)

    def select(self, chosen: Chosen) -> tuple[Ids, Ints]:
        """Ids of the chosen bags, in that order, and the bags' lengths."""
        if self.offsets is None:
            ids = self.values[chosen]
            return ids, np.ones(ids.size, dtype=np.int64)
        lengths = np.diff(self.offsets)[chosen]
        if isinstance(chosen, slice):
            return self.values[self.offsets[chosen.start] : self.offsets[chosen.stop]], lengths
        starts = np.repeat(self.offsets[chosen] - (np.cumsum(lengths) - lengths), lengths)
        return self.values[starts + np.arange(starts.size)], lengths
