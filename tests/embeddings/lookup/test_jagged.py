"""Selecting bags: against Python lists."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.lookup.jagged import select_bags

Bags = list[list[int]]


@st.composite
def bag_lists(draw: st.DrawFn) -> tuple[list[Bags], list[int]]:
    bags = draw(st.integers(1, 6))
    size = st.just(1) if draw(st.booleans()) else st.integers(0, 3)
    features = [
        [draw(st.lists(st.integers(0, 99), min_size=(n := draw(size)), max_size=n)) for _ in range(bags)]
        for _ in range(draw(st.integers(1, 3)))
    ]
    return features, draw(st.lists(st.integers(0, bags - 1), max_size=8))


def as_kjt(features: list[Bags]) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=[f"f{i}" for i in range(len(features))],
        values=torch.tensor([x for bags in features for bag in bags for x in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for bags in features for bag in bags], dtype=torch.int32),
        stride=len(features[0]),
    )


def as_lists(kjt: KeyedJaggedTensor) -> list[Bags]:
    return [[bag.tolist() for bag in kjt[key].to_dense()] for key in kjt.keys()]  # noqa: SIM118 - no dict


@settings(max_examples=100, deadline=None)
@given(bag_lists())
def test_select_bags_equals_list_indexing(case: tuple[list[Bags], list[int]]) -> None:
    features, chosen = case
    expected = [[bags[i] for i in chosen] for bags in features]
    known = all(len(bag) == 1 for bags in features for bag in bags)
    for one_id in (None, known, False):
        selected = select_bags(as_kjt(features), torch.tensor(chosen, dtype=torch.int64), one_id)
        assert selected.stride() == len(chosen)
        assert selected.length_per_key_or_none() == [sum(map(len, bags)) for bags in expected]
        assert as_lists(selected) == expected
