"""Singular values of bands are those of the whole matrix, and the measures are those of their papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.quality import singular_values as module
from trainer.quality.singular_values import SingularValues, abundance, rank_me


def of_bands(matrix: np.ndarray, cuts: list[int]) -> SingularValues:
    found = SingularValues(matrix.shape[1])
    for part in np.split(matrix, sorted(cuts)):
        found.add(torch.from_numpy(part))
    return found


@given(st.data())
def test_bands_have_the_singular_values_of_the_whole(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(0, 60)), data.draw(st.integers(1, 9))
    rng = np.random.default_rng(rows * width)
    # Columns of very different sizes, and of a smaller rank: what squares would lose.
    scale = 10.0 ** data.draw(st.lists(st.integers(-9, 3), min_size=width, max_size=width).map(np.array))
    rank = data.draw(st.integers(1, width))
    matrix = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, width)) * scale
    found = of_bands(matrix, data.draw(st.lists(st.integers(0, rows), max_size=4)))
    expected = np.linalg.svd(matrix, compute_uv=False)
    assert found.rows == rows and found.values().shape == expected.shape
    assert np.abs(found.values() - expected).max(initial=0) <= 1e-12 * expected.max(initial=0)


def test_more_rows_than_one_factorisation_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 7)
    matrix = np.random.default_rng(1).normal(size=(100, 5)).astype(np.float32)
    expected = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    found, rest = of_bands(matrix[:60], [11]), of_bands(matrix[60:], [])
    found.merge([rest.triangle])
    assert np.abs(found.values() - expected).max() <= 1e-12 * expected.max()


def test_rows_that_are_not_finite_are_left_out_and_counted() -> None:
    matrix = np.random.default_rng(2).normal(size=(9, 3))
    broken = matrix.copy()
    broken[4, 1], broken[7] = np.nan, np.inf
    found = of_bands(broken, [3])
    assert (found.rows, found.broken) == (7, 2)
    assert np.allclose(found.values(), np.linalg.svd(np.delete(matrix, [4, 7], 0), compute_uv=False))


@given(st.lists(st.floats(0, 1e6), max_size=8).map(np.array))
def test_measures_are_those_of_plain_formulas(values: np.ndarray) -> None:
    if not values.size or values.max() == 0:
        assert abundance(values) == rank_me(values) == 0
        return
    shares = [s / sum(values) for s in values]
    entropy = -sum(s * np.log(s) for s in shares if s)
    assert abundance(values) == pytest.approx(sum(values) / max(values))
    assert rank_me(values) == pytest.approx(np.exp(entropy))
    assert 1 - 1e-9 <= abundance(values) <= rank_me(values) * (1 + 1e-9) <= len(values) * (1 + 2e-9)
