"""Ranking losses by themselves, in float64: closed forms, shifts, and what has nothing to compare."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.config.tasks import TWO_LOGITS
from trainer.data.batch import label_counts
from trainer.objectives import pair as pair_module
from trainer.objectives.pair import pair
from trainer.objectives.ranking import Compared, HostCounts
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


@given(
    requests=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    within=st.sampled_from(["step", "request", "domain"]),
    positives=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    chunks=st.sampled_from([3, 1000]),
    seed=st.integers(0, 999),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_pairs_by_counts_are_those_that_a_look_finds(
    requests: list[int], within: str, positives: float, chunks: int, seed: int, data: st.DataObject
) -> None:
    """A GPU compares what a CPU compares, though nobody asks it how many positives there are."""
    count, random = sum(requests), torch.Generator().manual_seed(seed)
    request = torch.tensor([at for at, size in enumerate(requests) for _ in range(size)], dtype=torch.int64)
    domain = torch.randint(3, (count,), generator=random)
    group, groups = {"step": (None, 1), "request": (request, len(requests)), "domain": (domain, 3)}[within]
    looked = compared(seed, count, positives)
    labels = torch.where(torch.rand(count, generator=random) < 0.2, torch.nan, looked.labels)
    weight = torch.randint(3, (count,), generator=random).double()
    cut = sorted(data.draw(st.tuples(*[st.integers(0, count)] * 2)))
    own = slice(0, count) if within == "request" else slice(*cut)
    looked = replace(looked, labels=labels, weight=weight, group=group, groups=groups, own=own)
    parts = labels[: own.start], labels[own], labels[own.stop :]
    positive, negative = (
        [int(side.sum()) for side in of] for of in zip(*((y >= 0.5, y < 0.5) for y in parts), strict=True)
    )
    pairs = label_counts(labels[:, None], requests).pairs[0] if within == "request" else None
    counted = replace(looked, counts=HostCounts(tuple(positive), tuple(negative), pairs))
    found = []
    with mock.patch.multiple(pair_module, _CHUNK=chunks, _CHUNK_ON_DEVICE=chunks):
        for each in (looked, counted):
            values = pair(each)
            found.append((values, gradients(values, each)[0]))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-12)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-12, atol=1e-15)


def test_by_counts_no_pair_of_two_requests_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a candidate that is neither: the cost is that of the pairs there are."""
    looked_at: list[int] = []
    softplus = pair_module.F.softplus

    def note(numbers: Tensor) -> Tensor:
        looked_at.append(numbers.numel())
        return softplus(numbers)

    given = compared(7, 40, group=torch.arange(40) // 8)
    labels = given.labels.index_fill(0, torch.arange(0, 40, 8), torch.nan)
    sizes = label_counts(labels[:, None], [8] * 5)
    positives, pairs = sizes.positives[0], sizes.pairs[0]
    negatives = sizes.observed[0] - positives
    counts = HostCounts((0, positives, 0), (0, negatives, 0), pairs)
    monkeypatch.setattr(pair_module.F, "softplus", note)
    pair(replace(given, labels=labels, counts=counts))
    assert looked_at == [pairs] and pairs < positives * negatives
    looked_at.clear()
    pair(replace(given, labels=labels, group=None, groups=1, counts=replace(counts, pairs=None)))
    assert looked_at == [positives * negatives]


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


def test_tasks_know_which_ranking_losses_train_two_logits() -> None:
    assert {name for name, ranking in RANKINGS.items() if ranking.two_logits} == TWO_LOGITS


def test_threads_do_not_change_the_gradient_of_what_a_group_has() -> None:
    """A gradient that several threads add up by themselves is another one in most of these tries."""
    count, groups, random = 100_000, 50, torch.Generator().manual_seed(0)
    group, factor = torch.randint(groups, (count,), generator=random), torch.randn(count, generator=random)
    given = replace(compared(count=count), group=group, groups=groups)
    threads, found = torch.get_num_threads(), list[Tensor]()
    try:
        for number in (1, *[2] * 10):
            torch.set_num_threads(number)
            of_groups = torch.zeros(groups, requires_grad=True)
            found += torch.autograd.grad((given.of_group(of_groups) * factor).sum(), of_groups)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, found[0]) for gradient in found)
