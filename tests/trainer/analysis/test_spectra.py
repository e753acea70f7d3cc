"""Spectra of tables against numpy's, and the random tables that they are compared with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embeddings.first_rows import FirstWeights
from trainer.analysis import spectra as module
from trainer.analysis.spectra import random_seed, random_spectrum, table_spectrum

FIRST = FirstWeights("normal", 0.1)


@given(st.data())
def test_a_table_is_measured_whole_and_by_its_trained_rows(data: st.DataObject) -> None:
    rows, dim = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 6))
    rng = np.random.default_rng(rows * dim)
    table = rng.normal(size=(rows, dim))
    trained = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=3)))
    parts = zip(np.split(table, cuts), np.split(trained, cuts), strict=True)
    bands = [(torch.from_numpy(part), torch.from_numpy(mask)) for part, mask in parts]
    found = table_spectrum(bands, dim, FIRST, 5)
    assert found.tells and found.broken == 0
    for spectrum, some in ((found.whole, table), (found.trained, table[trained])):
        expected = np.linalg.svd(some, compute_uv=False)
        assert spectrum.rows == len(some)
        assert np.abs(spectrum.values - expected).max(initial=0) <= 1e-12 * expected.max(initial=0)
    assert (found.random.rows, found.random.dim) == (trained.sum(), dim)
    if trained.any():
        values = np.linalg.svd(table[trained], compute_uv=False)
        assert found.trained.abundance == pytest.approx(values.sum() / values[0])
        assert found.trained.largest_share == pytest.approx(values[0] ** 2 / (values**2).sum())
        share = found.trained.abundance / found.random.abundance
        assert found.abundance_share == pytest.approx(share)
    else:
        assert np.isnan(found.abundance_share) and np.isnan(found.rank_me_share)


def test_without_an_optimizer_that_tells_all_rows_count() -> None:
    table = torch.eye(5, 3)
    found = table_spectrum([(table[:2], None), (table[2:], None)], 3, FIRST, 0)
    assert not found.tells and found.trained.rows == found.whole.rows == 5
    assert found.trained.abundance == pytest.approx(3)


def test_rows_that_are_not_finite_are_counted_alone() -> None:
    table = torch.eye(5, 3)
    table[1, 1], table[4, 0] = float("nan"), float("inf")
    found = table_spectrum([(table, torch.arange(5) < 3)], 3, FIRST, 0)
    assert (found.broken, found.trained.rows, found.whole.rows) == (2, 2, 3)


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_a_large_random_table_is_like_one_that_is_drawn(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = FirstWeights(kind, 0.3)  # type: ignore[arg-type]
    drawn = np.array([random_spectrum(3000, 8, first, random_seed(seed, "t")).values for seed in range(40)])
    monkeypatch.setattr(module, "_DRAWN_ROWS", 0)
    quick = np.array([random_spectrum(3000, 8, first, random_seed(seed, "t")).values for seed in range(40)])
    # A singular value deviates by about 1 / sqrt(2 rows) of itself, a mean of 40 by a sixth of that.
    assert np.abs(quick.mean(0) / drawn.mean(0) - 1).max() < 5 * np.sqrt(2 / 40) / np.sqrt(2 * 3000)
    assert 0.5 < quick.std(0).mean() / drawn.std(0).mean() < 2


def test_random_tables_follow_from_the_seed() -> None:
    seeds = [random_seed(1, "a"), random_seed(2, "a"), random_seed(1, "b")]
    spectra = [random_spectrum(20, 4, FIRST, seed).values for seed in seeds]
    assert (spectra[0] == random_spectrum(20, 4, FIRST, seeds[0]).values).all()
    assert not (spectra[0] == spectra[1]).any() and not (spectra[0] == spectra[2]).any()
