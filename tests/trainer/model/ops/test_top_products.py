"""The K best of a matrix product by the compiled kernel, against a slow sort of exact scores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.models import drawing
from trainer.model.ops import top_products as module
from trainer.model.ops.top import Doubt
from trainer.model.ops.top_products import Kernel, Piece, kernel, top_products

FOUND = kernel()
compiled = pytest.mark.skipif(FOUND is None, reason="no C compiler was there when the package was installed")
KINDS = [replace(FOUND, lanes=lanes) for lanes in (4, 8, 16) if lanes <= FOUND.lanes] if FOUND else []


def sorted_columns(score_CX: Tensor, k: int, last: bool) -> tuple[Tensor, Tensor]:
    """Of exact scores, in the order of the keys; ties go to the lower column as it is counted."""
    score_CX = score_CX.flip(1) if last else score_CX
    k, width = min(k, score_CX.shape[1]), score_CX.shape[1]
    order = score_CX.sort(dim=1, descending=True, stable=True)
    real = order.values[:, :k] > -torch.inf
    columns = torch.where(real, order.indices[:, :k], width).sort(dim=1).values
    return columns.clamp(max=width - 1), columns < width


@compiled
@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.sampled_from([1, 3, 9, 70]),
    width=st.one_of(st.integers(1, 60), st.integers(150, 700), st.just(4_000)),
    dim=st.integers(0, 20),
    k=st.sampled_from([1, 2, 12, 60]),
    levels=st.sampled_from([0, 1, 3, 1000]),
    masked=st.sampled_from([0.0, 0.3, 1.0]),
    biased=st.booleans(),
    beside=st.booleans(),
    last=st.booleans(),
    rising=st.booleans(),
)
@pytest.mark.parametrize("by", KINDS, ids=lambda kind: f"{kind.lanes} lanes")
def test_the_kernel_keeps_what_a_slow_sort_does(
    by: Kernel,
    seed: int,
    rows: int,
    width: int,
    dim: int,
    k: int,
    levels: int,
    masked: float,
    biased: bool,
    beside: bool,
    last: bool,
    rising: bool,
) -> None:
    """Whole numbers, few of them different: many ties; rising scores raise every bound."""
    rng = drawing(seed)
    query = torch.randint(-levels, levels + 1, (rows, 2 * dim), generator=rng).float()[:, :dim]
    key = torch.randint(-levels, levels + 1, (width, dim), generator=rng).float()
    bias = torch.randint(-3, 4, (width,), generator=rng).float() if biased or rising else None
    if bias is not None:
        bias = bias + torch.arange(width) * 100.0 if rising else bias
        bias[torch.rand(width, generator=rng) < masked] = -torch.inf
    added = torch.randint(-3, 4, (rows, width), generator=rng).float() if beside else None
    score = query @ key.T
    for part in (bias, added):
        score = score if part is None else score + part
    counted = score.flip(1) if last else score
    doubt = Doubt(torch.full((rows,), 0.5), lambda row, column: counted[row, column].double())
    pieces = [Piece(0, rows, key, bias, added)]
    found = top_products(query, pieces, k, doubt, last=last, by=by)
    wanted = sorted_columns(score, k, last)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))
    plain = top_products(query, pieces, k, doubt, last=last, by=None)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, plain, strict=True))


@compiled
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.integers(400, 9_000), dim=st.integers(1, 70), last=st.booleans())
@pytest.mark.parametrize("by", KINDS, ids=lambda kind: f"{kind.lanes} lanes")
def test_rounding_decides_nothing(by: Kernel, seed: int, width: int, dim: int, last: bool) -> None:
    """Random vectors, each third key twice: the exact scores decide, and of equal ones the column."""
    rng = drawing(seed)
    query, key = torch.randn(66, dim, generator=rng), torch.randn(width, dim, generator=rng)
    key[1::3] = key[::3][: key[1::3].shape[0]]
    exact = query.double() @ key.double().T
    # Rounded so far that equal keys have equal scores, and others very likely not.
    exact = (exact * 2.0**40).round()
    counted = exact.flip(1) if last else exact
    norms = query.norm(dim=1) * key.norm(dim=1).max()
    doubt = Doubt((dim + 16) * 2.0**-22 * norms, lambda row, column: counted[row, column])
    found = top_products(query, [Piece(0, 66, key)], 20, doubt, last=last, by=by)
    wanted = sorted_columns(exact, 20, last)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


@compiled
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, 1e38])
def test_what_is_hardly_a_number_is_for_the_plain_form(odd: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN is the best, as everywhere; the kernel is not asked."""
    monkeypatch.setattr(Kernel, "pack", None)
    query, key = torch.ones(2, 3), torch.ones(200, 3)
    key[150, 1] = odd
    slack = 1e-6 * query.norm(dim=1) * key.norm(dim=1).amax() ** 2
    doubt = Doubt(slack, lambda row, column: (query.double() @ key.double().T)[row, column])
    column, mask = top_products(query, [Piece(0, 2, key)], 4, doubt, by=FOUND)
    assert mask.all() and (column == 150).any(1).all()


@compiled
def test_no_rows_and_no_keys_are_answered() -> None:
    doubt = Doubt(torch.zeros(0), lambda row, column: row.double())
    column, mask = top_products(torch.zeros(0, 4), [Piece(0, 0, torch.zeros(9, 4))], 3, doubt, by=FOUND)
    assert column.shape == mask.shape == (0, 3)
    doubt = Doubt(torch.zeros(2), lambda row, column: row.double())
    column, mask = top_products(torch.zeros(2, 4), [], 3, doubt, by=FOUND)
    assert column.tolist() == [[0], [0]] and not mask.any()
    assert module.kernel() is FOUND


@compiled
def test_a_library_of_earlier_code_is_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_INTERFACE", 0)
    assert module.kernel.__wrapped__() is None
    assert "compiled from an earlier version" in capsys.readouterr().err
