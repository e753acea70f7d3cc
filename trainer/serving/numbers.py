"""Numbers as clients send them become the codes that ingest would have made of them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from trainer.log.arrow import is_text
from trainer.log.bags import Ints
from trainer.log.encoders.code import (
    MISSING,
    code_of,
    codes_of_integers,
    codes_of_reals,
    in_range,
    number_of,
)
from trainer.log.encoders.encoder import Encoder
from trainer.serving.request import RequestError
from trainer.serving.vocabulary import check_text

_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
# More digits than any number of 64 bits, or its fraction, needs; Python refuses to read thousands.
_LONGEST = 400
# A float64 holds every integer up to here.
_EXACT = 2**53
# Outside of every range.
_BEYOND = 1e308


def codes_of_values(values: Sequence[float | str | None], encoder: Encoder, place: str) -> Ints:
    """The codes of numbers, of text that spells numbers, and of None, which is missing.

    Args:
        place: of the values in the body, for messages.

    Raises:
        RequestError: 422 for text that is no number.
    """
    try:
        given = np.asarray(values) if values else np.zeros(0, dtype=np.int64)
    except (ValueError, OverflowError):
        given = np.empty(0, dtype=object)
    if given.dtype == np.int64:
        codes = _of_integers(given, encoder)
    elif given.dtype == np.float64 and np.abs(given).max() < _EXACT:
        # Integers among them are exact, too.
        codes = codes_of_reals(given.astype(np.float64, copy=False), encoder.step)
    else:
        codes = np.array([_code(value, encoder, f"{place}[{at}]") for at, value in enumerate(values)])
    return in_range(codes, *encoder.limits)


def codes_of_array(values: pa.Array, encoder: Encoder, place: str) -> Ints:
    """The same of an Arrow array: integers, floats, decimals or text; null and NaN are missing.

    Raises:
        RequestError: 422 for another type, or text that is no number.
    """
    kind = values.type
    if pa.types.is_dictionary(kind):
        check_text(values.dictionary, place)
        return codes_of_array(values.dictionary.take(values.indices), encoder, place)
    if pa.types.is_null(kind):
        return np.full(len(values), MISSING, dtype=np.int64)
    if pa.types.is_decimal(kind) and kind.scale > 0:
        # Python takes the nearest float, as ingest does; the cast of Arrow misses it in the last bit.
        reals = [None if each is None else float(each) for each in values.to_pylist()]
        values, kind = pa.array(reals, pa.float64()), pa.float64()
    if is_text(kind) or pa.types.is_decimal(kind):
        check_text(values, place)
        listed = [None if each is None else str(each) for each in values.to_pylist()]
        return codes_of_values(listed, encoder, place)
    missing = values.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_floating(kind):
        known = pc.fill_null(values.cast(pa.float64()), 0.0).to_numpy(zero_copy_only=False)
        codes = codes_of_reals(known, encoder.step)
    elif pa.types.is_uint64(kind) and encoder.step == 1:
        codes = codes_of_integers(pc.fill_null(values, 0).to_pylist())
    elif pa.types.is_integer(kind):
        whole = pc.fill_null(values, 0).to_numpy(zero_copy_only=False)
        exact = encoder.step == 1
        codes = (
            code_of(whole.astype(np.int64)) if exact else codes_of_reals(whole.astype(float), encoder.step)
        )
    else:
        raise RequestError(422, f"{place}: holds {kind}, expected numbers")
    codes[missing] = MISSING
    return in_range(codes, *encoder.limits)


def values_of_codes(codes: Ints, encoder: Encoder) -> list[int | float | str | None]:
    """Numbers that a client may send for these codes: as text where a browser's numbers are not exact."""

    def value(whole: int, missing: bool, overflow: bool) -> int | float | str | None:
        if missing or overflow:
            return None if missing else math.copysign(_BEYOND, whole)
        if encoder.step != 1:
            return whole * float(encoder.step)
        return whole if abs(whole) < _EXACT else str(whole)

    return [value(*each) for each in zip(*(part.tolist() for part in number_of(codes)), strict=True)]


def _of_integers(whole: npt.NDArray[Any], encoder: Encoder) -> Ints:
    if encoder.step == 1:
        return code_of(whole.astype(np.int64))
    return codes_of_reals(whole.astype(np.float64), encoder.step)


def _code(value: float | str | None, encoder: Encoder, place: str) -> int:
    if isinstance(value, str):
        value = _spelled(value, place)
    if value is None or isinstance(value, int):
        return int(codes_of_integers([value], encoder.step)[0])
    return int(codes_of_reals(np.array([value]), encoder.step)[0])


def _spelled(text: str, place: str) -> int | float:
    if len(text) <= _LONGEST and _WHOLE.fullmatch(text):
        return int(text)
    if len(text) <= _LONGEST and _NUMBER.fullmatch(text):
        return float(text)
    raise RequestError(422, f"{place}: {text[:40]!r} is no number")
