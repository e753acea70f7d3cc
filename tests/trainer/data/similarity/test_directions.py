"""Cosines of directions have the same bits in any shape, since every step of a product is exact."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.config.similarity import SimilarityConfig
from trainer.data.similarity.directions import LENGTH, UNITS, cosines, cosines_of_pairs, directions_of
from trainer.data.similarity.statistics import STATISTICS, counts_of_tiers


def slow_cosine(left: np.ndarray, right: np.ndarray) -> int:
    """By Python's integers, which are exact, and three rounded operations."""
    product = sum(int(a) * int(b) for a, b in zip(left, right, strict=True))
    weights = [math.sqrt(UNITS) / math.sqrt(sum(int(a) ** 2 for a in side)) for side in (left, right)]
    return math.floor(product * weights[0] * weights[1] + 0.5)


@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.sampled_from(["normal", "spiky", "alike", "tiny"]))
@settings(deadline=None, max_examples=40)
def test_products_are_those_of_integers_in_any_shape(seed: int, dim: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(12, dim))
    if kind == "spiky":
        vectors = vectors**9
    elif kind == "alike":
        vectors = np.ones((12, dim)) + 1e-5 * vectors
    elif kind == "tiny":
        vectors *= 1e-300
    found = directions_of(vectors).astype(np.float32)
    left, right = found[:5], found[5:]
    whole = cosines(left, right)
    expected = np.array([[slow_cosine(a, b) for b in right] for a in left])
    assert np.array_equal(whole, expected)
    cut = int(rng.integers(0, 8))
    assert np.array_equal(np.concatenate([cosines(left, right[:cut]), cosines(left, right[cut:])], 1), whole)
    order = rng.permutation(7)
    assert np.array_equal(cosines(left, np.asfortranarray(right[order])), whole[:, order])
    assert np.array_equal(cosines_of_pairs(left, right[:5]), np.diag(whole[:, :5]))


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3, 16, 63, 64, 768, 4097]))
@settings(deadline=None, max_examples=20)
def test_no_sum_leaves_the_integers_of_float32(seed: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = np.concatenate([np.ones((1, dim)), np.eye(1, dim), rng.normal(size=(4, dim))])
    found = directions_of(vectors).astype(np.int64)
    assert (found**2).sum(axis=1).max() <= LENGTH**2
    exact = found @ found.T
    assert np.array_equal(found.astype(np.float32) @ found.astype(np.float32).T, exact)


def test_a_vector_is_its_direction() -> None:
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(6, 48))
    whole = directions_of(vectors)
    assert np.array_equal(directions_of(vectors[2:3]), whole[2:3])
    assert np.array_equal(directions_of(1e8 * vectors), whole)
    assert not directions_of(np.zeros((2, 3))).any()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    found = cosines(whole.astype(np.float32), whole.astype(np.float32)) / UNITS
    assert np.abs(found - unit @ unit.T).max() < 1e-3
    assert (np.diag(found) == 1).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 12), st.integers(2, 40))
@settings(deadline=None, max_examples=30)
def test_statistics_do_not_depend_on_the_order(seed: int, count: int, top: int, tiers: int) -> None:
    rng = np.random.default_rng(seed)
    cosine = rng.integers(-UNITS, UNITS + 1, (3, count)).astype(np.float64)
    cosine[0, 0] = UNITS
    config = SimilarityConfig(of="a", to="a", top=top)
    largest = [sorted(map(int, row), reverse=True) for row in cosine]
    expected = {
        "max": [row[0] / UNITS for row in largest],
        "mean": [sum(row) / (count * UNITS) for row in largest],
        "top": [sum(row[:top]) / (min(top, count) * UNITS) for row in largest],
    }
    for name, statistic in STATISTICS.items():
        for given_ in (cosine, cosine[:, rng.permutation(count)]):
            assert statistic(given_.copy(), config).tolist() == expected[name]
    counts = np.zeros((3, tiers), dtype=np.int64)
    for row, each in enumerate(largest):
        for value in each:
            counts[row, min((value + UNITS) * tiers // (2 * UNITS), tiers - 1)] += 1
    assert np.array_equal(counts_of_tiers(cosine, tiers), counts)
