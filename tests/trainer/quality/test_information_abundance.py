"""Information abundance is that of the singular values, wherever a table lies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.launching import launched
from tests.helpers.models import drawing
from trainer.checkpoint.tensors import TensorReader
from trainer.quality.information_abundance import information_abundance
from trainer.quality.singular_values import SingularValues


@given(rows=st.integers(1, 30), width=st.integers(1, 9), rank=st.integers(1, 9))
def test_it_is_the_sum_of_singular_values_by_the_largest(rows: int, width: int, rank: int) -> None:
    rng = drawing(rows * width + rank)
    table = torch.randn(rows, rank, generator=rng) @ torch.randn(rank, width, generator=rng)
    values = torch.linalg.svdvals(table.double())
    found = information_abundance(table)
    assert found == pytest.approx(float(values.sum() / values.max()), abs=1e-12)
    assert 1 - 1e-12 <= found <= min(rows, width, rank) + 1e-5


def test_known_tables() -> None:
    assert information_abundance(torch.eye(5, 3)) == pytest.approx(3)
    assert information_abundance(torch.ones(5, 3)) == pytest.approx(1)
    assert information_abundance(torch.zeros(5, 3)) == 0


def test_sharded_tables_have_that_of_the_whole_table(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    saved = tmp_path / "saved"
    done = launched("tests.programs.abundance", str(out), str(saved), ranks=2, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(out.read_text())
    assert {name.split()[0] for name in found} > {"row_wise", "column_wise", "grid_shard", "table_wise"}
    for name, (ours, expected) in found.items():
        assert ours == pytest.approx(expected, rel=1e-12), name
        assert expected > 1.5
    names = {name.split()[0]: name.split()[2:] for name in found}
    for sharding, tensors in names.items():
        reader = TensorReader(saved / sharding / "step-00000001")
        assert {*tensors} <= {*reader.names()}
        for name in tensors:
            rows, width = reader.shape(name)
            for most in (1, 40, 1 << 20):  # bytes of a band
                values = SingularValues(width)
                for _, band in reader.bands(name, most):
                    values.add(band)
                expected = np.linalg.svd(reader.whole(name).double().numpy(), compute_uv=False)
                assert values.rows == rows
                assert np.abs(values.values() - expected).max() <= 1e-12 * expected.max(), (sharding, name)
