"""Many maps at once are the same maps one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.models import draw, drawing
from trainer.model.heads.expert_layer import ExpertBank
from trainer.model.heads.expert_settings import ExpertsConfig
from trainer.model.heads.grouped import DomainLinear, GroupedLinear, applied, linear
from trainer.model.heads.nets import cin
from trainer.model.heads.nets.table import EXPERTS
from trainer.model.ops import by_group
from trainer.model.ops.by_group import Groups, Layout

sizes = st.integers(1, 5)


@given(count=sizes, candidates=st.integers(0, 5), width=sizes, outputs=sizes)
def test_grouped_maps_are_linear_maps_one_by_one(
    count: int, candidates: int, width: int, outputs: int
) -> None:
    rng = drawing(count * candidates + width)
    maps = GroupedLinear(count, width, outputs)
    assert float(maps.weight.detach().abs().max()) <= width**-0.5, "starts as nn.Linear does"
    x_ECW = torch.randn(count, candidates, width, generator=rng)
    slow = torch.stack(
        [nn.functional.linear(*each) for each in zip(x_ECW, maps.weight, maps.bias, strict=True)]
    )
    assert torch.allclose(maps(x_ECW), slow, atol=1e-6)
    if count == 1:
        assert torch.equal(maps(x_ECW), slow)


@given(inputs=sizes, each=sizes, candidates=st.integers(0, 5), width=sizes, outputs=sizes)
def test_maps_of_one_input_are_maps_of_its_copies(
    inputs: int, each: int, candidates: int, width: int, outputs: int
) -> None:
    rng = drawing(inputs * each + candidates)
    maps = draw(GroupedLinear(inputs * each, width, outputs), rng)
    x_SCW = torch.randn(inputs, candidates, width, generator=rng).requires_grad_()
    fast, slow = maps.of_shared(x_SCW), maps(x_SCW.repeat_interleave(each, dim=0))
    assert fast.shape == slow.shape and torch.allclose(fast, slow, atol=1e-6)
    if each == 1:
        assert torch.equal(fast, slow)
    of_inputs = [torch.autograd.grad(form.square().sum(), x_SCW)[0] for form in (fast, slow)]
    assert torch.allclose(*of_inputs, atol=1e-4)


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that an operator made; views make none."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("net", ["mlp", "fm"])
def test_experts_of_one_input_read_it_where_it_lies(net: str) -> None:
    """No copy of a wide input for each of its experts."""
    bank = ExpertBank(ExpertsConfig(net=net, hidden=(3,), field=10), net, 1, 8, 40, 0)
    with Largest() as largest:
        bank([torch.randn(50, 40)])
    assert largest.numbers <= 50 * (40 + 6)


@given(
    experts=st.integers(1, 2),
    candidates=st.integers(1, 9),
    cells=st.integers(1, 400),
    maps=st.lists(st.integers(1, 3), min_size=1, max_size=3),
)
def test_maps_of_few_candidates_at_once_are_those_of_all(
    experts: int, candidates: int, cells: int, maps: list[int]
) -> None:
    settings = ExpertsConfig(net="cin", field=2, maps=tuple(maps))
    net = draw(EXPERTS["cin"].build(settings, experts, 7, 6), drawing(experts))
    x_ECW = torch.randn(experts, candidates, 7, generator=drawing(cells)).requires_grad_()
    found = []
    for limit in (1 << 26, cells):
        with mock.patch.object(cin, "CELLS", limit):
            out = net(x_ECW)
            leaves = [x_ECW, *net.parameters()]
            found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
            with torch.no_grad():
                assert torch.allclose(net(x_ECW), out, atol=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*found, strict=True))


def test_maps_hold_no_more_products_than_fit() -> None:
    settings = ExpertsConfig(net="cin", field=2, maps=(4, 4))
    net = EXPERTS["cin"].build(settings, 1, 8, 8)
    x_ECW = torch.randn(1, 64, 8).requires_grad_()
    held: list[int] = []
    with mock.patch.object(cin, "CELLS", 512), Largest() as largest:
        with saved_tensors_hooks(lambda part: held.append(part.numel()) or part, lambda part: part):
            out = net(x_ECW)
        out.sum().backward()
    # 16 pairs of maps and fields a layer, 2 layers, 2 elements: 8 candidates at once.
    assert largest.numbers <= max(512, 64 * 16) and max(held) <= 64 * 16


@given(
    domains=st.integers(1, 9),
    candidates=st.integers(0, 30),
    width=sizes,
    outputs=sizes,
    block=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_maps_of_domains_are_chosen_candidate_by_candidate(
    domains: int, candidates: int, width: int, outputs: int, block: int, seed: int
) -> None:
    """Both forms, also where domains are missing, or have more than a block or less."""
    rng = drawing(seed)
    maps = draw(DomainLinear(domains, width, outputs), rng)
    x_CW = torch.randn(candidates, width, generator=rng).requires_grad_()
    some = torch.randint(0, domains, (2,), generator=rng)[torch.randint(0, 2, (candidates,), generator=rng)]
    every = torch.randint(0, domains, (candidates,), generator=rng)
    groups = Groups(some if seed % 2 else every, domains)
    assert isinstance(applied(linear(width, outputs, domains), x_CW, groups), Tensor)
    rows = [maps.weight[d] @ x + maps.bias[d] for x, d in zip(x_CW, groups.of_row.tolist(), strict=True)]
    slow = torch.stack(rows) if rows else x_CW.new_zeros(0, outputs) + maps.bias[:0].sum()
    with mock.patch.object(by_group, "_BLOCK", block):
        layouts = by_group.stretches(groups), by_group.blocks(groups)
    forms = [by_group.linear_by_layout(x_CW, maps.weight, maps.bias, layout) for layout in layouts]
    forms += [maps(x_CW, groups), by_group.plain_linear_by_group(x_CW, maps.weight, maps.bias, groups)]
    for fast in forms:
        assert fast.shape == (candidates, outputs)
        assert torch.allclose(fast, slow, atol=1e-5)
        leaves = [*maps.parameters(), x_CW]
        found, expected = (
            torch.autograd.grad(form.square().sum(), leaves, retain_graph=True, allow_unused=True)
            for form in (fast, slow)
        )
        assert all(gradient is not None for gradient in found), "all domains take part"
        if rows:
            both = zip(found, expected, strict=True)
            assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in both)
    for layout in layouts:
        assert torch.equal(layout.source[layout.place], torch.arange(candidates))


@pytest.mark.parametrize("form", [by_group.stretches, by_group.blocks])
def test_many_domains_cost_no_more_than_one(form: Callable[[Groups], Layout]) -> None:
    """The largest tensor between is no multiple of N times C."""
    maps, x_CW = DomainLinear(100, 8, 8), torch.randn(1000, 8).requires_grad_()
    groups = Groups(torch.arange(1000) % 100, 100)
    with Largest() as largest:
        by_group.linear_by_layout(x_CW, maps.weight, maps.bias, form(groups)).sum().backward()
    assert largest.numbers <= 2 * (1000 * 8 + 100 * 8 * 8)


def test_one_domain_is_a_linear_map() -> None:
    assert isinstance(linear(3, 2), nn.Linear) and isinstance(linear(3, 2, 1), DomainLinear)


@given(
    net=st.sampled_from(sorted(EXPERTS)),
    inputs=st.integers(1, 3),
    each=st.integers(1, 3),
    beside=st.integers(0, 2),
)
def test_experts_of_a_bank_are_experts_alone(net: str, inputs: int, each: int, beside: int) -> None:
    """One bank of E experts against E banks of one, for values and gradients."""
    settings = ExpertsConfig(net=net, hidden=(5, 4), field=3, maps=(2, 3))
    bank = draw(ExpertBank(settings, net, inputs, each, 9, beside), drawing(inputs + each))
    given_ = [torch.randn(6, 9 + beside, generator=drawing(n)).requires_grad_() for n in range(inputs)]
    together = list(bank(given_))
    apart = []
    for number in range(inputs * each):
        alone = ExpertBank(settings, net, 1, 1, 9, beside)
        own = {}
        for name, tensor in bank.state_dict().items():
            head, _, tail = name.partition(".")
            if head == "norms":
                place, _, tail = tail.partition(".")
                if int(place) == number // each:
                    own[f"norms.0.{tail}"] = tensor
            else:
                own[name] = tensor[number : number + 1]
        alone.load_state_dict(own)
        apart += alone([given_[number // each]])
    assert len(together) == len(apart) == inputs * each
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(together, apart, strict=True))
    of_inputs = [
        torch.autograd.grad(sum(x.square().sum() for x in form), given_) for form in (together, apart)
    ]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*of_inputs, strict=True))
