"""Sums and products over few rows: the CPU's own forms against torch's, values and all gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.model.ops import bags


@st.composite
def uses(draw: st.DrawFn) -> tuple[int, Tensor]:
    """-> rows N, index [C, K]: rows that nobody uses, rows that all use, K = 1."""
    rows, candidates, k = draw(st.integers(1, 9)), draw(st.integers(0, 6)), draw(st.integers(1, 5))
    drawn = draw(st.lists(st.integers(0, rows - 1), min_size=candidates * k, max_size=candidates * k))
    return rows, torch.tensor(drawn, dtype=torch.int64).view(candidates, k)


def both(
    fast: Callable[..., Tensor], plain: Callable[..., Tensor], given_to: list[Tensor], seed: int
) -> None:
    """The two agree in what they return and in the gradient of every floating point argument."""
    answers = []
    for function in (fast, plain):
        leaves = [part.clone().requires_grad_(part.is_floating_point()) for part in given_to]
        found = function(*leaves)
        weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed), dtype=found.dtype)
        (found * weight).sum().backward()
        answers.append([found.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    for mine, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None)
@given(uses(), st.integers(1, 7), st.integers(0, 99))
def test_weighted_bags_are_those_of_torch(case: tuple[int, Tensor], width: int, seed: int) -> None:
    rows, index = case
    parts = [normal(rows, width, seed=seed), index, normal(*index.shape, seed=seed + 1)]
    both(bags.weighted_bags, bags.plain_weighted_bags, parts, seed)


@settings(deadline=None)
@given(uses(), st.integers(0, 7), st.integers(0, 99))
def test_dots_are_those_of_all_gathered_rows(case: tuple[int, Tensor], width: int, seed: int) -> None:
    rows, index = case
    parts = [normal(index.shape[0], width, seed=seed), normal(rows, width, seed=seed + 1), index]
    both(bags.dots, bags.plain_dots, parts, seed)


@settings(deadline=None)
@given(uses(), st.sampled_from([(), (1,), (3,), (2, 2)]), st.integers(0, 99))
def test_rows_are_looked_up(case: tuple[int, Tensor], shape: tuple[int, ...], seed: int) -> None:
    rows, index = case
    both(bags.rows_at, bags.plain_rows_at, [normal(rows, *shape, seed=seed), index], seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers_are_added_up_in_single_precision(dtype: torch.dtype) -> None:
    """What autocast hands over: its products and sums do not lose their low bits on the way."""
    rows, index = normal(40, 16, seed=1).to(dtype), torch.arange(40).view(2, 20)
    query, weight = normal(2, 16, seed=2).to(dtype), normal(2, 20, seed=3).to(dtype)
    found = bags.dots(query, rows, index), bags.weighted_bags(rows, index, weight)
    exact = (
        bags.plain_dots(query.double(), rows.double(), index),
        bags.plain_weighted_bags(rows.double(), index, weight.double()),
    )
    for mine, theirs in zip(found, exact, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


def test_gradients_are_the_same_bits_with_any_number_of_threads() -> None:
    index = torch.randint(0, 50, (3000, 20), generator=torch.Generator().manual_seed(5))
    rows = normal(50, 16, seed=6).float()
    weight, threads, found = normal(3000, 20, seed=7).float(), torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            leaves = [rows.clone().requires_grad_(), weight.clone().requires_grad_()]
            table = rows[:, 0].clone().requires_grad_()
            pooled = bags.weighted_bags(leaves[0], index, leaves[1])
            score = bags.dots(pooled, leaves[0], index) + bags.rows_at(table, index)
            score.square().sum().backward()
            found.append([leaf.grad for leaf in (*leaves, table)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("rows", [32767, 32768, 70_000])
def test_rows_beyond_narrow_numbers_keep_their_own_gradient(rows: int) -> None:
    index = torch.tensor([[rows - 1, 0], [rows // 2, rows - 1]])
    parts = [normal(rows, 3, seed=8), index, normal(2, 2, seed=9)]
    both(bags.weighted_bags, bags.plain_weighted_bags, parts, 10)
