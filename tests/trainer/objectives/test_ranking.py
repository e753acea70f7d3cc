"""Ranking losses by themselves, in float64: closed forms, shifts, and what has nothing to compare."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trainer.objectives import pair as pair_module
from trainer.objectives.pair import _add_pairs, pair
from trainer.objectives.ranking import Compared
from trainer.objectives.table import RANKINGS


def compared(seed: int = 0, count: int = 30, positives: float = 0.3, group: Tensor | None = None) -> Compared:
    random = torch.Generator().manual_seed(seed)
    logits, base = (torch.randn(count, generator=random, dtype=torch.float64) for _ in range(2))
    labels = (torch.rand(count, generator=random) < positives).double()
    groups = 1 if group is None else int(group.max()) + 1
    weight = torch.ones(count, dtype=torch.float64)
    return Compared(
        logits.requires_grad_(), base.requires_grad_(), labels, weight, group, groups, slice(0, count)
    )


def gradients(value: Tensor, given: Compared) -> tuple[Tensor, Tensor]:
    assert given.base is not None
    of_logits, of_base = torch.autograd.grad(value.sum(), [given.logits, given.base], allow_unused=True)
    return of_logits, given.base * 0 if of_base is None else of_base


def test_gradients_of_pairs_are_the_closed_form_and_add_up_to_nothing() -> None:
    given = compared()
    z, positive = given.logits.detach(), given.positive
    slope = (z[None, :] - z[:, None]).sigmoid() * (positive[:, None] & ~positive)
    expected = slope.sum(0) - slope.sum(1)
    gradient, _ = gradients(pair(given), given)
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-8) and abs(float(gradient.sum())) < 1e-10


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    group = torch.arange(30) % 4
    whole = compared(3, group=group)
    values, gradient = pair(whole), gradients(pair(whole), whole)[0]
    monkeypatch.setattr(pair_module, "_CHUNK", 7)
    assert torch.allclose(pair(whole), values, rtol=1e-12)
    assert torch.allclose(gradients(pair(whole), whole)[0], gradient, rtol=1e-12)


def test_a_device_that_looks_at_all_pairs_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without asking the device how many positives there are."""
    given = compared(4, group=torch.arange(30) % 3)
    sides = slice(0, 30), slice(0, 30)
    found = []
    for on_host in (True, False):
        monkeypatch.setattr(pair_module, "_compresses", lambda _, on_host=on_host: on_host)
        value, gradient = (torch.zeros(30, dtype=torch.float64) for _ in range(2))
        _add_pairs(given, given.logits.detach(), sides, value, gradient)
        found.append(torch.stack([value, gradient]))
    assert torch.allclose(*found, rtol=1e-12) and (found[0] != 0).any()


@pytest.mark.parametrize("name", ["pair", "list", "jrc"])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_constant_on_all_logits_changes_nothing(name: str, grouped: bool) -> None:
    given = compared(1, group=torch.arange(30) % 3 if grouped else None)
    # Of JRC's two logits, `logits` is the difference: a constant on both is one on `base`.
    shifted = replace(given, logits=given.logits + 3.7)
    if name == "jrc":
        shifted = replace(given, base=given.base + 3.7)
    values = RANKINGS[name].values
    assert torch.allclose(values(shifted), values(given), rtol=1e-12)


@pytest.mark.parametrize("name", RANKINGS)
@pytest.mark.parametrize("positives", [0.0, 1.0])
def test_nothing_to_compare_is_a_loss_of_zero_in_the_graph(name: str, positives: float) -> None:
    given = compared(2, positives=positives)
    values = RANKINGS[name].values(given)
    assert values.tolist() == [0.0] and RANKINGS[name].counts(given).tolist() == [0.0]
    assert all((gradient == 0).all() for gradient in gradients(values, given))
    # A group without candidates is none, too.
    group = torch.full((30,), 2)
    values = RANKINGS[name].values(replace(given, group=group, groups=4))
    assert values.tolist() == [0.0] * 4


@pytest.mark.parametrize("name", RANKINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_logits_are_finite(name: str, dtype: torch.dtype) -> None:
    given = compared(5)
    far = torch.where(torch.arange(30) % 2 == 0, 80.0, -80.0).to(dtype)
    logits, base = far.clone().requires_grad_(), far.flip(0).roll(1).clone().requires_grad_()
    given = replace(given, logits=logits, base=base, weight=given.weight.to(dtype))
    values = RANKINGS[name].values(given)
    assert values.isfinite().all() and values.dtype == dtype
    assert all(gradient.isfinite().all() for gradient in gradients(values, given))


@pytest.mark.parametrize("name", RANKINGS)
def test_a_candidate_of_weight_two_stands_for_two(name: str) -> None:
    given = compared(6, count=8, positives=0.5)
    twice = torch.tensor([0, 0, 1, 2, 2, 3, 4, 5, 6, 7])
    double = given.weight.clone()
    double[[0, 2]] = 2.0
    weighted = RANKINGS[name].values(replace(given, weight=double))
    assert given.base is not None
    copied = replace(
        given,
        logits=given.logits[twice],
        base=given.base[twice],
        labels=given.labels[twice],
        weight=given.weight[twice],
        own=slice(0, 10),
    )
    assert torch.allclose(weighted, RANKINGS[name].values(copied), rtol=1e-12)
