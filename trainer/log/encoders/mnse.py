"""Multiple numeral systems encoding: the digits of a number in several bases are ids of small tables.

Source: "Ads Recommendation in a Collapsed and Entangled World" (arXiv 2403.00793), section on MNSE. Numbers
with the same leading digits share vectors, so that neighbours are near each other before any training. Other
bases have their borders elsewhere. Missing, overflow and sign ids are ours.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated, Final, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from trainer.log.bags import Bags, Ints, offsets_of
from trainer.log.encoders.code import in_range, number_of
from trainer.log.encoders.encoder import Encoder, Number

# Ids of each base before those of its digits.
_MISSING, _OVERFLOW, _NEGATIVE, _DIGITS = range(4)
_MOST_BASE: Final = 1 << 16
_TABLE: Final = 1 << 12  # numbers whose digits are kept for a look-up
_LONG: Final = 1 << 32  # half of the time is enough for a division of shorter numbers


class Mnse(Encoder):
    """Digits in several bases.

    The ids of a base are 0 for missing, 1 for overflow, 2 for a negative sign, and 3 + place * base + digit,
    where place 0 is that of the last digit. A bag has all digits of a number, the first one first, and before
    them the sign, if the number is negative.
    """

    kind: Literal["mnse"]
    bases: tuple[Annotated[int, Field(ge=2, le=_MOST_BASE)], ...] = Field((2, 3, 10), min_length=1)
    """The bases."""
    range: tuple[Number, Number]
    """The least and the greatest number, in the unit of the column. They decide how many digits there are.
    Numbers outside have an id of their own, the same for all."""
    combine: Literal["concat", "sum"] = "concat"
    """`concat`: each base is a feature with a table of its own, so that the vectors of the bases lie side by
    side. `sum`: one table has the digits of all bases, and all of their vectors are added up."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        low, high = self.limits
        if low > high:
            raise ValueError(f"range = [{low}, {high}]: the first number must not be the greater one")
        if len(set(self.bases)) < len(self.bases):
            raise ValueError("bases names one base twice; leave each once")
        return self

    @property
    def limits(self) -> tuple[int, int]:
        low, high = self.range
        return self.quantise(low), self.quantise(high)

    def places(self, base: int) -> int:
        """How many digits a number of the range has at most."""
        most, places = max(map(abs, self.limits)), 1
        while most >= base:
            most, places = most // base, places + 1
        return places

    def rows(self, base: int) -> int:
        """The ids of a base."""
        return _DIGITS + self.places(base) * base

    def parts(self, name: str) -> dict[str, int]:
        if self.combine == "sum":
            return {f"{name}_digits": sum(map(self.rows, self.bases))}
        return {f"{name}_base_{base}": self.rows(base) for base in self.bases}

    def most_ids(self, name: str) -> dict[str, int]:
        sign = int(self.limits[0] < 0)
        most = [self.places(base) + sign for base in self.bases]
        return dict(zip(self.parts(name), [sum(most)] if self.combine == "sum" else most, strict=True))

    def meanings(self, name: str) -> dict[str, str]:
        if self.combine == "sum":
            # Ids of a base follow those of the others, so that each depends on all numbers of places.
            places = ", ".join(f"{self.places(base)} of base {base}" for base in self.bases)
            return {part: f"digits, {places}, {self.unit}" for part in self.parts(name)}
        meanings = [f"digits of base {base}, {self.unit}" for base in self.bases]
        return dict(zip(self.parts(name), meanings, strict=True))

    def encode(self, codes: Ints) -> dict[str, Bags]:
        value, missing, overflow = number_of(in_range(codes, *self.limits))
        # No number of the range is the least int64, so each has its opposite.
        size = np.where(overflow, 0, np.abs(value)).astype(np.uint64)
        told = missing | overflow, value < 0
        alone = np.where(missing, _MISSING, _OVERFLOW).astype(np.int32)
        if max(map(abs, self.limits)) < _LONG:
            size = size.astype(np.uint32)
        columns, first = dict[str, list[_Columns]](), 0
        for base in self.bases:
            suffix = "_digits" if self.combine == "sum" else f"_base_{base}"
            ids = _digits(size, base, self.places(base))
            columns.setdefault(suffix, []).append(_Columns(first, ids, *told, alone))
            first += self.rows(base) if self.combine == "sum" else 0
        return {suffix: _bags(parts) for suffix, parts in columns.items()}


class _Columns:
    """The ids of one base: of each number either all digits, with a sign or not, or one id alone.

    Args:
        first: what the ids of this base begin with in their table; digits: [n, places], ids without it.
        alone, negative: bool [n]; one: [n], the id of a number that is alone.
    """

    def __init__(
        self,
        first: int,
        digits: npt.NDArray[np.int32],
        alone: npt.NDArray[np.bool_],
        negative: npt.NDArray[np.bool_],
        one: npt.NDArray[np.int32],
    ) -> None:
        self.plain = not (alone.any() or negative.any())
        if self.plain:
            self.ids = digits + np.int32(first) if first else digits
            return
        # The first column is the sign, or what stands alone.
        head = np.where(alone, one, _NEGATIVE)[:, None]
        self.ids = np.concatenate([head, digits], axis=1, dtype=np.int32) + np.int32(first)
        self.used = np.broadcast_to(~alone[:, None], self.ids.shape).copy()
        self.used[:, 0] = alone | negative


def _bags(parts: list[_Columns]) -> Bags:
    # Of one base there is nothing to copy.
    ids = parts[0].ids if len(parts) == 1 else np.concatenate([part.ids for part in parts], axis=1)
    if all(part.plain for part in parts):
        return Bags(ids.ravel(), np.arange(ids.shape[0] + 1, dtype=np.int64) * ids.shape[1])
    used = np.concatenate([part.used for part in parts], axis=1)
    return Bags(ids[used], offsets_of(used.sum(1)))


def _digits(numbers: npt.NDArray[np.uint32 | np.uint64], base: int, places: int) -> npt.NDArray[np.int32]:
    """The ids of all digits: [n, places], the first digit first."""
    ids, rest, done = np.empty((numbers.size, places), np.int32), numbers, 0
    some = max(1, int(math.log(_TABLE, base)))
    while done < places:
        # Some digits at a time: their ids are looked up, which is faster than a division for each.
        count = min(some, places - done)
        radix = numbers.dtype.type(base**count)
        above = rest // radix
        found = _digit_table(base, count)[(rest - above * radix).astype(np.intp)]
        ids[:, places - done - count : places - done] = found + np.int32(done * base)
        rest, done = above, done + count
    return ids


@lru_cache(64)
def _digit_table(base: int, places: int) -> npt.NDArray[np.int32]:
    """The ids of the digits of all numbers of so many places: [base ** places, places]."""
    place = np.arange(places - 1, -1, -1)
    digits = np.arange(base**places)[:, None] // base**place % base
    return (_DIGITS + base * place + digits).astype(np.int32)
