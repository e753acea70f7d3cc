"""Crocodile's covariance loss; that ranks change nothing is in test_on_ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.objectives.covariance import Covariance, covariance_of


def outputs(seed: int = 0, rows: int = 12, experts: int = 3, width: int = 4) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, experts, width, generator=random, dtype=torch.float64)
    return (drawn + 2).requires_grad_()


def looped(experts_BEd: Tensor) -> Tensor:
    rows, experts, width = experts_BEd.shape
    total = torch.zeros((), dtype=torch.float64)
    for p in range(experts):
        for q in range(p + 1, experts):
            for i in range(width):
                for j in range(width):
                    one, other = experts_BEd[:, p, i], experts_BEd[:, q, j]
                    total = total + ((one - one.mean()) * (other - other.mean())).sum().abs() / (rows - 1)
    return total / width**2


@pytest.mark.parametrize("over", ["rank", "step"])
def test_it_is_what_a_loop_over_pairs_of_experts_and_dimensions_says(over: str) -> None:
    given = outputs()
    value, expected = Covariance(1.0, over).value(given), looped(given)  # type: ignore[arg-type]
    assert torch.allclose(value, expected, rtol=1e-12)
    gradients = [torch.autograd.grad(each, given, retain_graph=True)[0] for each in (value, expected)]
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-12) and (gradients[0] != 0).all()


def test_constants_change_nothing_and_orthogonal_experts_have_none() -> None:
    given = outputs(1)
    loss = Covariance(1.0)
    shift = torch.arange(12, dtype=torch.float64).view(3, 4)
    assert torch.allclose(loss.value(given + shift), loss.value(given), rtol=1e-12)
    columns = torch.linalg.qr(outputs(2, 12, 3, 2).detach().flatten(1) - 2)[0]
    centred = torch.linalg.qr(torch.cat([torch.ones(12, 1, dtype=torch.float64), columns], 1))[0][:, 1:]
    assert loss.value(centred.reshape(12, 3, 2)).item() < 1e-15


def test_an_experts_own_variance_is_no_part_of_it() -> None:
    alone = outputs(3, experts=1)
    value = Covariance(1.0).value(alone)
    assert value.item() == 0 and (torch.autograd.grad(value, alone)[0] == 0).all()


def test_no_pair_of_experts_is_computed_twice() -> None:
    """Multiply-adds of the matrix products, and the numbers that they give: those of pairs p < q."""
    given, found = outputs(5, rows=8, experts=6, width=4), []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            found.extend([out.numel()] if func is torch.ops.aten.mm.default else [])
            return out

    with Products():
        Covariance(1.0).value(given)
    assert sum(found) == 6 * 5 // 2 * 4**2


def test_the_first_rows_may_do_and_one_row_has_no_covariance() -> None:
    given = outputs(4)
    assert torch.equal(Covariance(1.0, "rank", 5).value(given), Covariance(1.0).value(given[:5]))
    assert Covariance(1.0).value(given[:1]).item() == 0


def test_a_model_without_experts_has_none() -> None:
    assert covariance_of(object()) is None
