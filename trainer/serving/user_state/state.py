"""The state of one user: their history, and what follows from it for each behavior.

Behaviors are numbered by their place in the history as the client sent it, from 0, also where a request holds
only the newest of them. Tensors have a row for each behavior. A matrix product may round by a row's place, so
products are made for `BLOCK` places at a time: what a behavior's rows are depends on the behavior and its
place alone, and not on whether they were made at once or bit by bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from trainer.log.bags import Bags, Ints
from trainer.serving.request import History

# Places of a block of a product.
BLOCK = 256
# Places whose rows begin at a multiple of 64 bytes, whatever their type, as memory of their own does: rows
# then lie alike in every state that has them.
LINE = 64
_CACHE_LINE = 64
# Behaviors that tell users apart where a history is shorter than a block.
_FIRST = 32
_TIME, _IDS, _OFFSETS, _ROWS, _PLACE = "time", "ids/", "offsets/", "rows/", "place"


def block_of(place: int) -> int:
    """Where the block of a place begins."""
    return place - place % BLOCK


@dataclass(frozen=True)
class Stretch:
    """Consecutive behaviors of a history.

    Attributes:
        first: place of the first; last: place after the last.
        time: int64 [n]; features: name -> ids of the n behaviors.
    """

    first: int
    time: Ints
    features: Mapping[str, Bags]

    @staticmethod
    def of(history: History, begin: int, end: int, skipped: int) -> Stretch:
        """Behaviors [begin, end) of a request's history, before which `skipped` were cut off."""
        features = {name: _cut(bags, begin, end) for name, bags in history.features.items()}
        return Stretch(skipped + begin, history.time[begin:end], features)

    @property
    def size(self) -> int:
        return int(self.time.size)

    @property
    def last(self) -> int:
        return self.first + self.size

    @property
    def nbytes(self) -> int:
        parts = [part for bags in self.features.values() for part in (bags.values, bags.offsets)]
        return sum(part.nbytes for part in (self.time, *parts) if part is not None)

    def cut(self, first: int, last: int) -> Stretch:
        """Those of places [first, last), which must be here; a view."""
        begin, end = first - self.first, last - self.first
        if not begin and end == self.size:
            return self
        features = {name: _cut(bags, begin, end) for name, bags in self.features.items()}
        return Stretch(first, self.time[begin:end], features)

    def join(self, newer: Stretch) -> Stretch:
        """With the behaviors behind these; in memory of its own."""
        features = {name: _joined(bags, newer.features[name]) for name, bags in self.features.items()}
        return Stretch(self.first, np.concatenate([self.time, newer.time]), features)

    def copy(self) -> Stretch:
        """The same in memory of its own: a view keeps all that it was cut from."""
        features = {
            name: Bags(bags.values.copy(), None if bags.offsets is None else bags.offsets.copy())
            for name, bags in self.features.items()
        }
        return Stretch(self.first, self.time.copy(), features)

    def equals(self, other: Stretch) -> bool:
        """Whether both hold the same behaviors at the same places."""
        return (
            self.first == other.first
            and self.features.keys() == other.features.keys()
            and np.array_equal(self.time, other.time)
            and all(_equal(bags, other.features[name]) for name, bags in self.features.items())
        )

    def digest(self) -> bytes:
        """Of some old behaviors, which stay the same while the history grows: tells users apart that have no
        number."""
        begin = self.first + (-self.first % BLOCK)
        whole = begin + BLOCK <= self.last
        part = (
            self.cut(begin, begin + BLOCK)
            if whole
            else self.cut(self.first, min(self.first + _FIRST, self.last))
        )
        content = hashlib.sha256(part.time.tobytes())
        for name, bags in sorted(part.features.items()):
            content.update(f" {name} ".encode() + np.ascontiguousarray(bags.values).tobytes())
        return content.digest()


@dataclass(frozen=True)
class UserState:
    """What a history gives, whatever is asked about it.

    Attributes:
        key: digest of the snapshot, of the settings that matter, and of the user.
        known: the behaviors that it is of.
        origin: place of the first row of every tensor, a multiple of `LINE`.
        rows: name -> [P, ...]; rows of places that are not in `known` mean nothing.
        writable: whether places behind the last may be filled in where they lie.
    """

    key: bytes
    known: Stretch
    origin: int
    rows: Mapping[str, Tensor]
    writable: bool = True

    @cached_property
    def nbytes(self) -> int:
        """Of memory."""
        return self.known.nbytes + sum(part.numel() * part.element_size() for part in self.rows.values())

    @property
    def places(self) -> int:
        """P."""
        return max((part.shape[0] for part in self.rows.values()), default=0)

    def has(self, wanted: Stretch) -> bool:
        """Whether it has all of these behaviors, unchanged."""
        here = self.known.first <= wanted.first and wanted.last <= self.known.last
        return here and self.known.cut(wanted.first, wanted.last).equals(wanted)

    def precedes(self, wanted: Stretch) -> bool:
        """Whether these behaviors are some that it has, unchanged, and newer ones behind them."""
        known = self.known
        if not known.first <= wanted.first <= known.last < wanted.last:
            return False
        shared = known.cut(wanted.first, known.last), wanted.cut(wanted.first, known.last)
        return wanted.first < known.last and shared[0].equals(shared[1])

    def part(self, name: str, first: int, last: int) -> Tensor:
        """Rows of places [first, last); a view."""
        return self.rows[name][first - self.origin : last - self.origin]

    def is_finite(self) -> bool:
        """Whether all that it says is numbers: it is made of rows that may have been written over."""
        return all(bool(part.isfinite().all()) for part in self.rows_of(self.known).values())

    def rows_of(self, wanted: Stretch) -> dict[str, Tensor]:
        """Rows of behaviors that it has, by name; views."""
        return {name: self.part(name, wanted.first, wanted.last) for name in self.rows}

    def tensors(self) -> dict[str, Tensor]:
        """All of it but the key, as tensors: what a store keeps."""
        place = torch.tensor([self.known.first, self.origin])
        found = {_PLACE: place, _TIME: torch.from_numpy(self.known.time)}
        for name, bags in self.known.features.items():
            found[f"{_IDS}{name}"] = torch.from_numpy(bags.values)
            if bags.offsets is not None:
                found[f"{_OFFSETS}{name}"] = torch.from_numpy(bags.offsets)
        return found | {f"{_ROWS}{name}": part for name, part in self.rows.items()}

    @staticmethod
    def of(key: bytes, tensors: Mapping[str, Tensor]) -> UserState:
        """The state that gave these tensors; they are read and never written.

        Raises:
            ValueError: no state gives such tensors.
        """
        try:
            first, origin = tensors[_PLACE].tolist()
            time = tensors[_TIME].numpy()
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"no user's state: {error}") from None
        features = {}
        for name, ids in _named(tensors, _IDS).items():
            offsets = tensors.get(f"{_OFFSETS}{name}")
            features[name] = Bags(ids.numpy(), None if offsets is None else offsets.numpy())
        known = Stretch(first, time, features)
        rows = {name: _from_line(part) for name, part in _named(tensors, _ROWS).items()}
        places = {part.shape[0] for part in rows.values()}
        reach = origin + max(places, default=0)
        whole = all(bags.size == time.size for bags in features.values())
        if len(places) > 1 or not whole or origin % LINE or not origin <= first <= known.last <= reach:
            raise ValueError("no user's state: its parts do not fit together")
        return UserState(key, known, origin, rows, writable=False)


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}


def _from_line(part: Tensor) -> Tensor:
    """In memory that begins at a multiple of 64 bytes, as that of a state that was made here does."""
    return part if part.data_ptr() % _CACHE_LINE == 0 else part.clone()


def _cut(bags: Bags, begin: int, end: int) -> Bags:
    """Bags [begin, end), a view of the ids."""
    if bags.offsets is None:
        return Bags(bags.values[begin:end])
    offsets = bags.offsets[begin : end + 1]
    return Bags(bags.values[offsets[0] : offsets[-1]], offsets - offsets[0])


def _joined(older: Bags, newer: Bags) -> Bags:
    values = np.concatenate([older.values, newer.values])
    if older.offsets is None and newer.offsets is None:
        return Bags(values)
    return Bags.of_lengths(values, np.concatenate([older.lengths, newer.lengths]))


def _equal(mine: Bags, theirs: Bags) -> bool:
    if not np.array_equal(mine.values, theirs.values):
        return False
    if mine.offsets is None and theirs.offsets is None:
        return mine.size == theirs.size
    return np.array_equal(mine.lengths, theirs.lengths)
