"""Numbers become ids of intervals, against a plain count of the edges below."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.log.encoders.buckets import Buckets
from trainer.log.encoders.code import codes_of_integers

NUMBERS = st.integers(-(2**64), 2**64) | st.integers(-5, 5)


@given(
    st.lists(st.integers(-(2**62), 2**62) | st.integers(-5, 5), min_size=1, unique=True),
    st.lists(st.none() | NUMBERS),
)
def test_a_number_has_the_bucket_of_the_edges_below_it(edges: list[int], values: list[int | None]) -> None:
    encoder = Buckets(kind="buckets", edges=tuple(sorted(edges)))
    found = encoder.encode(codes_of_integers(values))[""]
    wanted = [0 if value is None else 1 + sum(edge <= value for edge in edges) for value in values]
    assert found.values.tolist() == wanted
    assert found.offsets is None
    assert all(one < encoder.parts("price")["price"] for one in wanted)


def test_edges_of_reals_are_counted_in_steps() -> None:
    encoder = Buckets(kind="buckets", edges=(0.1, 0.3), step=0.1)
    assert encoder.encode(codes_of_integers([0, 1, 2, 3]))[""].values.tolist() == [1, 2, 2, 3]


def test_as_many_rows_as_buckets_and_one_for_missing() -> None:
    assert Buckets(kind="buckets", edges=(1, 2, 3)).parts("age") == {"age": 5}
    assert Buckets(kind="buckets", count=4).parts("age") == {"age": 5}


@pytest.mark.parametrize("edges", [(2, 1), (1, 1), (0.1, 0.2)])
def test_edges_must_ascend(edges: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError, match="must ascend"):
        Buckets(kind="buckets", edges=edges)


def test_edges_or_a_count() -> None:
    for settings in ({}, {"edges": (1,), "count": 3}):
        with pytest.raises(ValidationError, match="either `edges` or `count`"):
            Buckets.model_validate({"kind": "buckets", **settings})
