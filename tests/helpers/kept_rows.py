"""Rows that candidates keep, and what must hold of sums and products over them; on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.models import drawing
from trainer.model.ops import kept_rows
from trainer.model.ops.bags import plain_dots, plain_weighted_bags


@st.composite
def used(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> part [C, D], rows [N, D], index and weight [C, K].

    Rows that nobody uses, one that many use, as masked places do, and more rows than one program takes.
    """
    rng = drawing(draw(st.integers(0, 10_000)))
    rows, candidates = draw(st.sampled_from([1, 9, 70])), draw(st.integers(1, 9))
    k, dim = draw(st.sampled_from([1, 3, 7])), draw(st.sampled_from([4, 12, 64, 100]))
    index = torch.randint(0, rows, (candidates, k), generator=rng)
    index[torch.rand(candidates, k, generator=rng) < draw(st.sampled_from([0.0, 0.7]))] = 0
    weight = torch.randn(candidates, k, generator=rng)
    weight[torch.rand(candidates, k, generator=rng) < draw(st.sampled_from([0.0, 0.3]))] = 0.0
    part, row = (torch.randn(n, dim, generator=rng) for n in (candidates, rows))
    return part, row, index, weight


def check(part_CD: Tensor, rows_ND: Tensor, index_CK: Tensor, weight_CK: Tensor) -> None:
    """Values and all gradients are torch's, and the same once more."""
    assert kept_rows.fits(rows_ND, index_CK)
    agree(kept_rows.dots, plain_dots, [part_CD, rows_ND, index_CK], weight_CK)
    agree(kept_rows.weighted_bags, plain_weighted_bags, [rows_ND, index_CK, weight_CK], part_CD)


def agree(
    fast: Callable[..., Tensor], plain: Callable[..., Tensor], given_to: list[Tensor], gradient: Tensor
) -> None:
    answers = []
    for function in (fast, plain, fast):
        leaves = [part.clone().requires_grad_(part.is_floating_point()) for part in given_to]
        found = function(*leaves)
        found.backward(gradient)
        answers.append([found.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    for mine, theirs, again in zip(*answers, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        assert torch.equal(mine, again)


@settings(max_examples=12, deadline=None, database=None, phases=[Phase.generate])
@seed(0)
@given(used())
def check_drawn(given_to: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    check(*given_to)
