"""Seeded pseudo-randomness that every SQL engine computes alike, whatever its threads or row order."""

from __future__ import annotations

from functools import reduce

import ibis
from ibis.expr import types as ir

_HEX = "0123456789abcdef"


def digest(seed: int, purpose: str, *columns: ir.Value) -> ir.StringValue:
    """MD5, as hexadecimal text, of seed, purpose and the columns; sort by it to shuffle.

    `purpose` keeps two uses of one seed independent. The columns must not be null.
    """
    text = [column.cast("string") for column in columns]
    joined = reduce(lambda left, right: left + "/" + right, text)
    return (ibis.literal(f"{seed}/{purpose}/") + joined).hexdigest("md5")


def number(seed: int, purpose: str, *columns: ir.Value, digits: int = 12) -> ir.IntegerValue:
    """An integer drawn uniformly from [0, 16**digits); modulo n it is uniform up to a bias of n / 16**digits.

    12 digits are 48 bits: far above any row count, and no overflow of a signed 64-bit integer.
    """
    return _read(digest(seed, purpose, *columns), 0, digits)


def text_id(text: ir.StringValue) -> ir.IntegerValue:
    """The same as `trainer.log.hashed_ids.hash_text`; the text must not be null."""
    hexadecimal = text.hexdigest("md5")
    high, low = (_read(hexadecimal, first, 8) for first in (0, 8))
    # The highest bit is the sign of a 64-bit integer.
    return ibis.ifelse(high >= 1 << 31, high - (1 << 32), high) * (1 << 32) + low


def _read(text: ir.StringValue, first: int, digits: int) -> ir.IntegerValue:
    """The number that some hexadecimal digits stand for."""
    # Reading digit by digit is slower than casting "0x...", but that cast is DuckDB's alone.
    values = [ibis.literal(_HEX).find(text.substr(place, 1)) for place in range(first, first + digits)]
    # Ibis takes a found place for 64 bits wide, but Spark's has 32: the zero makes it so.
    return reduce(lambda value, digit: value * 16 + digit, values, ibis.literal(0).cast("int64"))
