"""Rows that are asked for most, side by side in memory, in front of a table that is larger than it.

The system keeps pages of a mapped file, not rows: a row of 64 bytes that is asked for all the time keeps a
page of 4 KiB in memory, with 63 rows beside it that nobody may ask for. Hot rows that lie side by side take
their own bytes alone. They are copied as they are stored, so that whatever is looked up has the same bits as
without them.

Which rows are hot is counted: the ids of the newest look-ups are noted, and now and then a thread copies the
rows that were asked for most, at first often, and ever less so. Ids, rows and notes take no more memory than
they were given, and rows take it twice while others are chosen.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embeddings.lookup.plain import PlainBagCollection
from embeddings.lookup.stored import RowStore, StoredTable, rows_at

Ids = npt.NDArray[np.int64]
# Places that a row may have: an id belongs to one set, and a set has so many places.
_WAYS = 8
# Ids that are noted for each row that may be kept.
_NOTES = 2
_ID_BYTES = 8
# Knuth's multiplicative hash: the odd number nearest to 2^63 divided by the golden ratio.
_MULTIPLIER = 5_700_357_409_661_599_241
# Rows that are copied at once.
_SOME = 1 << 12
# Look-ups without which no row is worth to be read for it alone.
_LEAST = 2
# Rows are chosen anew after as many look-ups as there are notes, then after twice as many, and so on up to:
_LONGEST = 64
# Bytes of a table below which the system keeps all of it in memory anyhow.
SMALL = 4 << 20
# No id of a table.
_NONE = torch.iinfo(torch.int64).min


class HotCounts(NamedTuple):
    """What was looked up since the beginning: rows in all, those that were hot, and rows kept now."""

    looked_up: int
    hot: int
    kept: int


@dataclass(frozen=True)
class _Kept:
    """Rows by id, in sets of `_WAYS` places: keys int64 [sets, ways], rows [sets * ways, columns]."""

    keys: Tensor
    rows: Tensor
    count: int


class HotRows(RowStore):
    """A stored table [rows, columns] with its hot rows in memory. Looking up must not overlap itself.

    Args:
        table: whose rows these are, usually memory-mapped.
        size: bytes that may be taken; less than one row and its share of notes: nothing is kept.
    """

    def __init__(self, table: StoredTable, size: int) -> None:
        self.table, self.size = table, size
        columns = table.shape[1]
        slot = columns * table.dtype.itemsize + _ID_BYTES * (1 + _NOTES)
        self._sets = size // (slot * _WAYS)
        self._kept: _Kept | None = None
        self._notes = np.zeros(_NOTES * self._sets * _WAYS, dtype=np.int64)
        # Ids that were noted since the beginning, and at how many of them rows are chosen anew.
        self._noted, self._wait = 0, self._notes.size
        self._choose_at = self._wait
        self._looked_up = self._hot = 0
        self._thread: threading.Thread | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.table.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.table.dtype

    @property
    def counts(self) -> HotCounts:
        return HotCounts(self._looked_up, self._hot, 0 if self._kept is None else self._kept.count)

    def index_select(self, ids: Tensor) -> Tensor:
        """Stored rows [n, columns] of ids [n]; IndexError for one outside of the table."""
        if not self._sets:
            return rows_at(self.table, ids)
        ids = ids.long()
        self._note(ids)
        found, hot = self._select(self._kept, ids)
        self._hot += hot
        return found

    def noted(self) -> Ids:
        """The ids of the newest look-ups, in no order."""
        return self._notes[: min(self._noted, self._notes.size)].copy()

    def keep(self, ids: Ids) -> None:
        """Keep the rows that these ids name most often, from now on; those outside of the table are left out.

        A row must be named twice, for to read it costs as much as to look it up once. One that is kept
        already counts once more: it need not be read. Of two that are named as often the smaller id is kept,
        so that the same ids keep the same rows.
        """
        if not self._sets:
            return
        before = self._kept
        known, counts = np.unique(ids[(ids >= 0) & (ids < self.shape[0])], return_counts=True)
        if before is not None:
            counts = counts + np.isin(known, before.keys.numpy())
        worth = counts >= _LEAST
        known, counts = known[worth], counts[worth]
        known = known[np.argsort(-counts, kind="stable")]
        # By set, the most frequent first; a set keeps as many as it has places.
        of_set = self._set_of(torch.from_numpy(known)).numpy()
        order = np.argsort(of_set, kind="stable")
        known, of_set = known[order], of_set[order]
        way = np.arange(known.size) - np.searchsorted(of_set, of_set)
        fits = way < _WAYS
        place, chosen = torch.from_numpy((of_set * _WAYS + way)[fits]), torch.from_numpy(known[fits])
        keys = torch.full((self._sets * _WAYS,), _NONE)
        rows = torch.empty((self._sets * _WAYS, self.shape[1]), dtype=self.dtype)
        keys[place] = chosen
        for at, some in zip(place.split(_SOME), chosen.split(_SOME), strict=True):
            rows[at] = self._select(before, some)[0]
        self._kept = _Kept(keys.view(self._sets, _WAYS), rows, chosen.numel())

    def wait(self) -> None:
        """Until rows that are being chosen are kept."""
        if self._thread is not None:
            self._thread.join()

    def _note(self, ids: Tensor) -> None:
        """Remember what is looked up; now and then choose anew which rows are kept."""
        self._looked_up += ids.numel()
        newest = ids.numpy()[-self._notes.size :]
        at = self._noted % self._notes.size
        first = min(newest.size, self._notes.size - at)
        self._notes[at : at + first] = newest[:first]
        self._notes[: newest.size - first] = newest[first:]
        self._noted += newest.size
        if self._noted >= self._choose_at and (self._thread is None or not self._thread.is_alive()):
            self._wait = min(2 * self._wait, _LONGEST * self._notes.size)
            self._choose_at = self._noted + self._wait
            self._thread = threading.Thread(
                target=self.keep, args=(self.noted(),), name="hot-rows", daemon=True
            )
            self._thread.start()

    def _select(self, kept: _Kept | None, ids: Tensor) -> tuple[Tensor, int]:
        """Stored rows of ids, and how many of them were hot."""
        if kept is None:
            return rows_at(self.table, ids), 0
        of_set = self._set_of(ids)
        hot, way = (kept.keys.index_select(0, of_set) == ids[:, None]).max(1)
        # An empty place has a key that is no id of a table, and a wrong id may be that very one.
        hot &= ids >= 0
        found = kept.rows.index_select(0, of_set * _WAYS + way)
        cold = torch.nonzero(~hot).squeeze(1)
        if cold.numel():
            found.index_copy_(0, cold, rows_at(self.table, ids.index_select(0, cold)))
        return found, ids.numel() - cold.numel()

    def _set_of(self, ids: Tensor) -> Tensor:
        """The set of each id: the upper half of a product, reduced to as many sets as there are."""
        # Products wrap around. Of the upper 31 bits, since those depend on all bits of an id.
        mixed = (ids * _MULTIPLIER) >> 32
        return (mixed & 0x7FFF_FFFF) % self._sets


def keep_hot_rows(collections: Iterable[PlainBagCollection], size: int) -> dict[str, HotRows]:
    """Have the large tables of some collections keep hot rows: each in proportion to its bytes.

    Args:
        size: bytes for all of them together; 0 = none are kept.

    Returns:
        The tables that do, by name.
    """
    if not size:
        return {}
    tables: dict[str, tuple[PlainBagCollection, StoredTable, int]] = {}
    for collection in collections:
        for name, stored in collection.tables().items():
            taken = stored.shape.numel() * stored.dtype.itemsize
            if taken >= SMALL:
                tables[name] = (collection, stored, taken)
    found: dict[str, HotRows] = {}
    whole = sum(taken for _, _, taken in tables.values())
    for name, (collection, stored, taken) in tables.items():
        found[name] = HotRows(stored, size * taken // whole)
        collection.put(name, found[name])
    return found


def total(tables: Mapping[str, HotRows]) -> HotCounts:
    """The counts of several tables."""
    counts = [table.counts for table in tables.values()]
    return HotCounts(*map(sum, zip(*counts, strict=True))) if counts else HotCounts(0, 0, 0)
