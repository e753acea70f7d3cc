"""Codes of numbers: what a log has of a number, and the number again."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.log.encoders.code import (
    ABOVE,
    BELOW,
    LARGEST,
    MISSING,
    code_of,
    codes_of_integers,
    codes_of_reals,
    in_range,
    integer_of,
    number_of,
)

INTEGERS = st.integers(-LARGEST, LARGEST) | st.sampled_from([0, -1, 1, 2**53 + 1, LARGEST, -LARGEST])


def test_known_codes_stay_what_they_are() -> None:
    """They lie in logs, so that no later version may give others."""
    assert codes_of_integers([None, 0, 1, -1, LARGEST, -LARGEST]).tolist() == [
        *(0, 1, 2, -1, 2**63 - 1, -(2**63) + 2)
    ]
    assert codes_of_integers([2**63 - 1, 10**30, -(2**63) + 1, -(10**30)]).tolist() == [
        *(ABOVE, ABOVE, BELOW, BELOW)
    ]
    assert codes_of_reals(np.array([np.nan, np.inf, -np.inf, 2.5, -2.5, 1e300]), 1).tolist() == [
        *(MISSING, ABOVE, BELOW, 4, -2, ABOVE)
    ]


@given(st.lists(st.none() | INTEGERS))
def test_integers_come_back(values: list[int | None]) -> None:
    codes = codes_of_integers(values)
    found = number_of(codes)
    assert found.value.tolist() == [value or 0 for value in values]
    assert found.missing.tolist() == [value is None for value in values]
    assert not found.overflow.any()
    assert len(set(codes.tolist())) == len(set(values))
    present = np.array([value for value in values if value is not None], dtype=np.int64)
    assert code_of(present).tolist() == [code for code in codes.tolist() if code != MISSING]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_arrays_and_single_integers_have_the_same_codes(values: list[int]) -> None:
    assert code_of(np.array(values)).tolist() == codes_of_integers(values).tolist()


@given(
    st.lists(st.floats(allow_infinity=False, allow_nan=False)),
    st.sampled_from([1, 0.01, 0.1, 3, 1e-9, 1e12]),
)
def test_reals_and_single_numbers_have_the_same_codes(values: list[float], step: float) -> None:
    def slow(value: float) -> int:
        share = value / step
        if math.isinf(share):
            return ABOVE if share > 0 else BELOW
        whole = math.floor(share + 0.5) if abs(share) < 2**52 else int(share)
        return int(codes_of_integers([whole])[0])

    assert codes_of_reals(np.array(values, dtype=np.float64), step).tolist() == list(map(slow, values))


@given(st.lists(st.integers(-(2**53), 2**53)))
def test_floats_that_are_integers_have_the_codes_of_integers(values: list[int]) -> None:
    assert (
        codes_of_reals(np.array(values, dtype=np.float64), 1).tolist() == codes_of_integers(values).tolist()
    )


def test_a_step_divides_integers_of_any_size() -> None:
    assert codes_of_integers([149, 150, -150, 10**400, -(10**400)], 100).tolist() == [2, 3, -1, ABOVE, BELOW]
    assert integer_of(0.07, 0.01) == 7


@given(st.lists(INTEGERS | st.none(), min_size=1), INTEGERS, INTEGERS)
def test_what_is_outside_of_a_range_overflows(values: list[int | None], one: int, other: int) -> None:
    low, high = sorted((one, other))
    found = number_of(in_range(codes_of_integers(values), low, high))
    wanted = [value is not None and not low <= value <= high for value in values]
    assert found.overflow.tolist() == wanted
    assert found.missing.tolist() == [value is None for value in values]


@pytest.mark.parametrize("code", [ABOVE, BELOW, MISSING])
def test_what_overflowed_stays_so_in_every_range(code: int) -> None:
    assert in_range(np.array([code]), -LARGEST, LARGEST).tolist() == [code]
