"""Digits in several numeral systems, against a plain loop with divmod."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from trainer.log.bags import Bags
from trainer.log.encoders.code import LARGEST, codes_of_integers
from trainer.log.encoders.mnse import Mnse
from trainer.log.encoders.table import AnyEncoder

BASES = (2, 3, 10)


def encoder_of(low: int, high: int, **settings: Any) -> Mnse:
    return Mnse(kind="mnse", range=(low, high), **settings)


def lists_of(bags: Bags) -> list[list[int]]:
    assert bags.offsets is not None
    offsets = bags.offsets.tolist()
    return [bags.values[a:b].tolist() for a, b in pairwise(offsets)]


def slow_ids(value: int | None, base: int, low: int, high: int) -> list[int]:
    """The ids of one base, as the docstring of the encoder says."""
    if value is None:
        return [0]
    if not low <= value <= high:
        return [1]
    most, places = max(abs(low), abs(high)), 1
    while most >= base:
        most, places = most // base, places + 1
    rest, ids = abs(value), list[int]()
    for place in range(places):
        rest, digit = divmod(rest, base)
        ids.insert(0, 3 + place * base + digit)
    return [2, *ids] if value < 0 else ids


def value_of(ids: list[int], base: int) -> int | None:
    """The number that the ids of a base stand for."""
    if ids in ([0], [1]):
        return None
    digits = [divmod(one - 3, base) for one in ids if one >= 3]
    size = sum(digit * int(base**place) for place, digit in digits)
    return -size if ids[0] == 2 else size


ENDS = st.integers(-LARGEST, LARGEST) | st.integers(-2000, 2000)


@given(st.data(), ENDS, ENDS)
def test_digits_are_those_of_a_plain_loop(data: st.DataObject, one: int, other: int) -> None:
    low, high = sorted((one, other))
    inside = st.integers(low, high)
    values = data.draw(st.lists(st.none() | inside | st.integers(-(2**64), 2**64), max_size=8))
    found = encoder_of(low, high).encode(codes_of_integers(values))
    summed = encoder_of(low, high, combine="sum").encode(codes_of_integers(values))
    assert list(found) == ["_base_2", "_base_3", "_base_10"]
    together: list[list[int]] = [[] for _ in values]
    first = 0
    for base, (suffix, rows) in zip(BASES, encoder_of(low, high).parts("").items(), strict=True):
        ids = lists_of(found[suffix])
        assert ids == [slow_ids(value, base, low, high) for value in values]
        assert all(0 <= one < rows for each in ids for one in each)
        assert max(map(len, ids), default=0) <= encoder_of(low, high).most_ids("")[suffix]
        for each, more in zip(together, ids, strict=True):
            each += [first + one for one in more]
        first += rows
    assert lists_of(summed["_digits"]) == together
    assert encoder_of(low, high, combine="sum").parts("")["_digits"] == first


@given(st.lists(st.integers(-LARGEST, LARGEST), min_size=1))
def test_digits_reconstruct_every_number(values: list[int]) -> None:
    values += [LARGEST, -LARGEST, 0, 2**53 + 1]
    found = encoder_of(-LARGEST, LARGEST).encode(codes_of_integers(values))
    for base, bags in zip(BASES, found.values(), strict=True):
        assert [value_of(ids, base) for ids in lists_of(bags)] == values


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=40))
def test_equal_numbers_have_equal_ids_and_others_have_not(values: list[int]) -> None:
    found = encoder_of(-50, 50).encode(codes_of_integers(values))
    for bags in found.values():
        distinct = {tuple(ids) for ids in lists_of(bags)}
        assert len(distinct) == len(set(values))


@pytest.mark.parametrize("value", [0, 10, 120, 999_990])
def test_the_last_digit_changes_one_summand_of_a_base(value: int) -> None:
    """Of base b, numbers differ in the last digit alone where both lie in one stretch of b."""
    encoder = encoder_of(0, 1_000_000)
    for base, suffix in zip(BASES, encoder.parts(""), strict=True):
        first = value - value % base
        one, other = lists_of(encoder.encode(codes_of_integers([first, first + base - 1]))[suffix])
        assert sum(a != b for a, b in zip(one, other, strict=True)) == 1
        assert one[-1] != other[-1]


def test_the_example_of_the_paper() -> None:
    """51 is 110011 in base 2 and 1220 in base 3."""
    found = encoder_of(0, 51, bases=(2, 3)).encode(codes_of_integers([51]))
    two, three = (lists_of(found[suffix])[0] for suffix in ("_base_2", "_base_3"))
    assert [(one - 3) % 2 for one in two] == [1, 1, 0, 0, 1, 1]
    assert [(one - 3) % 3 for one in three] == [1, 2, 2, 0]


def test_reals_are_counted_in_steps() -> None:
    encoder = encoder_of(-1, 1, step=0.01)
    assert encoder.limits == (-100, 100)
    assert encoder.places(10) == 3


def test_no_numbers_at_all() -> None:
    for combine in ("concat", "sum"):
        found = encoder_of(0, 9, combine=combine).encode(np.zeros(0, dtype=np.int64))
        assert all(bags.size == 0 and not bags.values.size for bags in found.values())


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"range": (5, 4)}, "must not be the greater one"),
        ({"range": (0, 2**63 - 1)}, r"beyond \+-\(2\^63 - 2\) steps of 1;"),
        ({"range": (0, 9), "step": 1e-320}, r"9 is beyond \+-\(2\^63 - 2\) steps of 1e-320"),
        ({"range": (0, 10**400)}, "larger than all 64-bit floats"),
        ({"range": (0, float("inf"))}, "no finite number"),
        ({"range": (0, 9), "bases": (2, 2)}, "names one base twice"),
        ({"range": (0, 9), "bases": (1,)}, "greater than or equal to 2"),
        ({"range": (0, 9), "step": 0}, "greater than 0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        TypeAdapter[Any](AnyEncoder).validate_python({"kind": "mnse", **settings})


def test_settings_survive_a_manifest() -> None:
    kinds = TypeAdapter[Any](AnyEncoder)
    for given_ in (
        encoder_of(-LARGEST, LARGEST),
        encoder_of(0, 1, step=0.25, bases=(7,), combine="sum"),
        kinds.validate_python({"kind": "buckets", "edges": [2**53 + 1, 2**53 + 2]}),
    ):
        assert kinds.validate_json(given_.model_dump_json()) == given_


def test_a_step_of_one_means_one_thing() -> None:
    for combine in ("concat", "sum"):
        whole, real = (encoder_of(0, 9, step=step, combine=combine) for step in (1, 1.0))
        assert whole.meanings("price") == real.meanings("price")
        assert real.meanings("price") != encoder_of(0, 9, step=1.5, combine=combine).meanings("price")
