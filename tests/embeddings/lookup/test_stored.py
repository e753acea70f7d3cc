"""Rows as they are stored: what comes back, how far it may be off, and what is refused."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from embeddings.lookup.stored import row_bytes, stored_columns, sum_bags, to_stored
from tests.helpers.models import drawing
from tests.helpers.tables import to_float


def table(seed: int, rows: int, dim: int, scale: float) -> Tensor:
    made = torch.randn(rows, dim, generator=drawing(seed)) * scale
    made[0] = 0.0
    return made


def decoded(row: bytes, dim: int) -> list[float]:
    """An int8 row by the book: codes, then scale and smallest value."""
    scale, smallest = struct.unpack("<ff", row[dim:])
    return [code * scale + smallest for code in row[:dim]]


@given(
    st.integers(0, 99),
    st.integers(1, 30),
    st.sampled_from([4, 8, 20, 64]),
    st.sampled_from([1e-4, 1.0, 300.0]),
)
def test_int8_rows_are_what_their_bytes_say_and_off_by_half_a_step(
    seed: int, rows: int, dim: int, scale: float
) -> None:
    whole = table(seed, rows, dim, scale)
    stored = to_stored(whole, "int8")
    assert stored.shape == (rows, stored_columns(dim, "int8")) and stored[0].nbytes == row_bytes(dim, "int8")
    found = to_float(stored)
    by_hand = torch.tensor([decoded(bytes(row.tolist()), dim) for row in stored])
    step = (whole.max(1).values - whole.min(1).values) / 255
    assert torch.allclose(found, by_hand, rtol=1e-6, atol=1e-6 * scale)
    # FBGEMM adds 1e-8 to the range before it divides by it.
    assert ((found - whole).abs().max(1).values <= step * 0.501 + 1e-6 * scale + 1e-8).all()


@given(st.integers(0, 99), st.sampled_from(["fp32", "fp16", "int8"]))
def test_bags_sum_the_rows_that_they_name(seed: int, dtype: str) -> None:
    rng = drawing(seed)
    stored = to_stored(table(seed, 40, 8, 1.0), dtype)  # type: ignore[arg-type]
    lengths = torch.randint(0, 4, (25,), generator=rng)
    ids = torch.randint(0, 40, (int(lengths.sum()),), generator=rng)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    found = sum_bags(stored, ids, offsets)
    slow = torch.stack([to_float(stored)[part].sum(0) for part in ids.split(lengths.tolist())])
    assert found.dtype == torch.float32 and torch.allclose(found, slow, atol=1e-5)
    single = torch.arange(40)
    assert torch.equal(sum_bags(stored, single, torch.arange(41)), to_float(stored))


@pytest.mark.parametrize("dim", [1, 4, 31, 64])
def test_bags_of_one_half_are_as_if_they_were_summed_in_floats(dim: int) -> None:
    """Every finite half, both zeros and those below the normal ones included, and bags that are empty."""
    halves = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()]
    stored = halves[: halves.numel() // dim * dim].view(-1, dim)
    ids = torch.randperm(stored.shape[0], generator=drawing(dim))
    offsets = torch.cat([torch.zeros(2, dtype=torch.int64), torch.arange(ids.numel() + 1)])
    found = sum_bags(stored, ids, offsets)
    slow = torch.nn.functional.embedding_bag(
        ids, stored.float(), offsets, mode="sum", include_last_offset=True
    )
    assert found.dtype == torch.float32 and torch.equal(found.view(torch.int32), slow.view(torch.int32))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_ids_outside_the_table_are_errors(dtype: str) -> None:
    stored = to_stored(table(1, 10, 8, 1.0), dtype)  # type: ignore[arg-type]
    for bad in (10, -1):
        with pytest.raises((RuntimeError, IndexError)):
            sum_bags(stored, torch.tensor([bad]), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("fp32", float("nan")), ("fp16", float("inf")), ("fp16", 7e4), ("int8", float("nan")), ("int8", 3e38)],
)
def test_what_a_type_cannot_hold_is_refused(dtype: str, value: float) -> None:
    rows = table(1, 10, 8, 1.0)
    rows[3, 2], rows[3, 5] = value, -value
    with pytest.raises(ValueError, match=f"too large for {dtype}"):
        to_stored(rows, dtype)  # type: ignore[arg-type]
