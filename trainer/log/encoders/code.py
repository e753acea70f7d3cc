"""A number in a sequence log is an int64 code, in which 0 means what it means for ids: nothing is known.

    missing                  -> 0
    integer v >= 0           -> v + 1
    integer v < 0            -> v
    above the declared range -> ABOVE, the least int64
    below the declared range -> BELOW, the one after it

So every v of +-LARGEST has a code of its own. A real number is first divided by a declared step and rounded
to the nearest integer, halves up. That is done in float64, by operations that IEEE 754 defines, so that each
engine of ingest and numpy give the same integer. Integers with step 1 never pass through a float.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.log.bags import Ints

Booleans = npt.NDArray[np.bool_]
Reals = npt.NDArray[np.float64]

MISSING: Final = 0
ABOVE: Final = -(2**63)
BELOW: Final = -(2**63) + 1
LARGEST: Final = 2**63 - 2
"""Declared ranges lie within +- this number."""
WHOLE_FROM: Final = 2.0**52
"""Every float64 from here on is an integer; adding a half to it would round it to another one."""


class Numbers(NamedTuple):
    """What codes stand for.

    Attributes:
        value: int64 [n], the quantised integer; 0 where missing, +-(2^63 - 1) where it is beyond the range.
        missing: bool [n]; overflow: bool [n], beyond the range.
    """

    value: Ints
    missing: Booleans
    overflow: Booleans


def code_of(values: Ints, missing: Booleans | None = None) -> Ints:
    """The codes of quantised integers, int64 [n]; those beyond +-LARGEST are overflow."""
    codes = np.where(values >= 0, values, values - 1) + 1
    codes[values > LARGEST] = ABOVE
    codes[values < -LARGEST] = BELOW
    if missing is not None:
        codes[missing] = MISSING
    return codes


def number_of(codes: Ints) -> Numbers:
    """The integers of codes, exactly."""
    value = codes - (codes > 0)
    overflow = codes <= BELOW
    value[codes == ABOVE] = LARGEST + 1
    return Numbers(value, codes == MISSING, overflow)


def in_range(codes: Ints, low: int, high: int) -> Ints:
    """The same codes, with ABOVE and BELOW for those whose integers lie outside of [low, high]."""
    value, missing, _ = number_of(codes)
    given = ~missing
    return np.where(given & (value > high), ABOVE, np.where(given & (value < low), BELOW, codes))


def quantised(values: Reals, step: float) -> Reals:
    """floor(x / step + 1/2) in float64; NaN and infinities stay what they are."""
    shares = values / step
    return np.where(np.abs(shares) < WHOLE_FROM, np.floor(shares + 0.5), shares)


def codes_of_reals(values: Reals, step: float) -> Ints:
    """The codes of real numbers: NaN is missing, and infinities are overflow."""
    with np.errstate(over="ignore"):
        whole = quantised(values, step)
    # As float64, LARGEST is 2^63; every float below it is an integer of int64.
    above, below, missing = whole >= 2.0**63, whole <= -(2.0**63), np.isnan(whole)
    codes = code_of(np.where(above | below | missing, 0, whole).astype(np.int64), missing)
    codes[above], codes[below] = ABOVE, BELOW
    return codes


def codes_of_integers(values: Sequence[int | None], step: float = 1) -> Ints:
    """The codes of integers of any size; None is missing."""
    return np.array([MISSING if value is None else _code(value, step) for value in values], dtype=np.int64)


def _code(value: int, step: float) -> int:
    whole = integer_of(value, step)
    if abs(whole) > LARGEST:
        return ABOVE if whole > 0 else BELOW
    return whole + 1 if whole >= 0 else whole


def integer_of(value: float, step: float) -> int:
    """The quantised integer of one finite number, which may be larger than 64 bits.

    Raises:
        OverflowError, ValueError: the number, or the number of steps, is infinite or NaN.
    """
    if step == 1 and isinstance(value, int):
        return value
    try:
        share = float(value) / step
    except OverflowError:
        # An integer beyond all floats: far outside of every range, whatever its last digits are.
        return int(Fraction(value) / Fraction(step))
    return math.floor(share + 0.5) if abs(share) < WHOLE_FROM else int(share)
