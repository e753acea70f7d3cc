"""Log odds of products (ESMM): exact, and finite wherever logits are."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.heads import tasks_of
from trainer.model.heads.head import HeadOutput
from trainer.model.heads.products import Products, product_log_odds

logits = st.floats(-80, 80, width=32)


def exact(values: list[float]) -> float:
    with localcontext() as context:
        context.prec = 120
        p = Decimal(1)
        for value in values:
            p /= 1 + (-Decimal(value)).exp()
        return float((p / (1 - p)).ln())


@given(values=st.lists(logits, min_size=2, max_size=4))
def test_log_odds_are_those_of_the_product_of_probabilities(values: list[float]) -> None:
    z = [torch.tensor([value], requires_grad=True) for value in values]
    found = product_log_odds(z)
    assert float(found.detach()) == pytest.approx(exact(values), abs=1e-4, rel=1e-5)
    gradients = torch.cat(torch.autograd.grad(found.sum(), z))
    assert torch.isfinite(gradients).all() and (gradients >= 0).all() and gradients.sum() >= 0.4


@pytest.mark.parametrize("value", [-300.0, 300.0])
def test_far_beyond_any_probability_of_float32_it_is_still_finite(value: float) -> None:
    z = [torch.tensor([value], requires_grad=True) for _ in range(2)]
    found = product_log_odds(z)
    assert torch.isfinite(found).all()
    assert torch.isfinite(torch.cat(torch.autograd.grad(found.sum(), z))).all()


def test_gradients_are_those_of_differences() -> None:
    z = [torch.tensor([value], requires_grad=True) for value in (0.3, -2.0, 4.0)]
    step = 1e-2
    analytic = torch.autograd.grad(product_log_odds(z).sum(), z)
    for place, gradient in enumerate(analytic):
        up, down = ([each.item() + s * (i == place) for i, each in enumerate(z)] for s in (step, -step))
        assert float(gradient) == pytest.approx((exact(up) - exact(down)) / (2 * step), abs=1e-4)


def test_half_precision_around_it_changes_nothing() -> None:
    z = [torch.tensor([20.0, -3.0, 0.1]), torch.tensor([19.0, 7.0, -0.2])]
    with torch.autocast("cpu", torch.bfloat16):
        found = product_log_odds(z)
        of_halves = product_log_odds([each.bfloat16() for each in z])
    assert found.dtype == of_halves.dtype == torch.float32
    assert torch.equal(found, product_log_odds(z))


def test_products_take_their_place_among_the_tasks() -> None:
    tasks = tasks_of("both", "click", "buy", both={"product": ("click", "buy")})
    output = HeadOutput(torch.tensor([[0.5, -1.0]]), torch.tensor([[7.0, 8.0]]))
    found = Products(tasks)(output)
    p = output.logits.sigmoid().prod()
    assert torch.allclose(found.logits, torch.tensor([[float(torch.logit(p)), 0.5, -1.0]]), atol=1e-6)
    assert found.base is not None and found.base.tolist() == [[0.0, 7.0, 8.0]]
    assert Products(tasks[1:])(output) is output
