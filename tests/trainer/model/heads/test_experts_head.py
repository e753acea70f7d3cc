"""The head `experts` against plain references of the papers' equations, and its laws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embeddings.errors import ConfigError
from tests.helpers.heads import STEM_SETS, drawn_input, head_of, model_with, sizes_of, stem_sizes, tasks_of
from trainer.model.heads.experts import ExpertsHead
from trainer.model.heads.head import HeadInput, HeadSizes, MlpHead

STEM = {"experts": {"own": 1, "foreign": "stopped"}, "mixer": {"kind": "softmax", "hidden": [5]}}
PLE = {"experts": {"own": 2, "shared": 2, "foreign": "hidden"}, "mixer": {"kind": "softmax"}}
OPEN = {"experts": {"own": 1}, "mixer": {"kind": "softmax"}}
ONE_TASK = tasks_of("click")


def stacked(preset: Mapping[str, Any], layers: int) -> dict[str, Any]:
    return {**preset, "experts": {**preset["experts"], "layers": layers}}


def layer_of(bank: Any, expert: int, x: Tensor, norm: int = 0) -> Tensor:
    """One expert of a bank, by torch's own layers."""
    x = bank.norms[norm](x)
    for layer in bank.layers:
        x = F.linear(x, layer.weight[expert], layer.bias[expert]).relu()
    return x


def tower_of(head: ExpertsHead, task: str, x: Tensor) -> Tensor:
    tower: Any = head.towers[f"task_{task}"]
    for slope, layer in zip(tower.slopes, tower.layers[:-1], strict=True):
        x = slope(layer(x))
    return tower.layers[-1](x)[:, 0]


def moves(gradient: Tensor | None) -> bool:
    return gradient is not None and bool((gradient != 0).any())


# Multi-Embedding


def test_one_set_is_the_model_of_a_single_embedding_to_the_bit() -> None:
    """Values and gradients; a set's name makes no difference. PReLU of slope 0 is ReLU."""
    single = MlpHead(sizes_of({"": [12]}, ONE_TASK), (64, 6))
    with torch.no_grad():
        single.layers[2].weight.zero_()
    for name in ("", "0"):
        sizes = sizes_of({name: [12]}, ONE_TASK)
        head = head_of(sizes)
        bank: Any = head.layers[0].banks["shared"]["12"]
        tower: Any = head.towers["task_click"]
        layers = {0: bank.norms[0], 3: tower.layers[0], 4: tower.slopes[0], 5: tower.layers[1]}
        for place, layer in layers.items():
            layer.load_state_dict(single.layers[place].state_dict())
        with torch.no_grad():
            bank.layers[0].weight[0] = single.layers[1].weight
            bank.layers[0].bias[0] = single.layers[1].bias
        given = drawn_input(sizes)
        found = head(given).logits, single(given).logits
        assert torch.equal(*found)
        ours, theirs = (torch.autograd.grad(each.square().sum(), given.parts)[0] for each in found)
        assert torch.equal(ours, theirs) and ours.abs().max() > 0


def test_linear_experts_are_one_embedding_of_the_total_width() -> None:
    """M sets with linear experts equal a block-diagonal single embedding: nothing is there but width."""
    linear = {"experts": {"hidden": [5], "norm": "none", "activation": "none"}}
    many, wide = sizes_of({name: [8] for name in "012"}, ONE_TASK), sizes_of({"": [8, 8, 8]}, ONE_TASK)
    head, single = head_of(many, **linear), head_of(wide, **linear)
    bank: Any = head.layers[0].banks["shared"]["8"]
    block: Any = single.layers[0].banks["shared"]["24"]
    single.towers.load_state_dict(head.towers.state_dict())
    with torch.no_grad():
        block.layers[0].weight[0] = torch.cat(list(bank.layers[0].weight), dim=1) / 3
        block.layers[0].bias[0] = bank.layers[0].bias.mean(0)
    given = drawn_input(many)
    assert torch.allclose(head(given).logits, single(HeadInput({"": given.parts}, [])).logits, atol=1e-6)
    # The guard can fail: with the non-linearity they differ.
    for each in (head, single):
        each.layers[0].banks["shared"][next(iter(each.layers[0].banks["shared"]))].activates = True  # type: ignore[union-attr]
    assert not torch.allclose(head(given).logits, single(HeadInput({"": given.parts}, [])).logits, atol=1e-2)


def test_the_order_of_sets_makes_no_difference() -> None:
    sizes = sizes_of({name: [8] for name in "012"}, ONE_TASK)
    head, turned, given = head_of(sizes), head_of(sizes), drawn_input(sizes)
    order = [2, 0, 1]
    bank, other = (each.layers[0].banks["shared"]["8"] for each in (head, turned))
    with torch.no_grad():
        other.layers[0].weight.copy_(bank.layers[0].weight[order])
        other.layers[0].bias.copy_(bank.layers[0].bias[order])
        for number, place in enumerate(order):
            other.norms[number].load_state_dict(bank.norms[place].state_dict())
    sets = {str(number): given.sets[str(place)] for number, place in enumerate(order)}
    assert torch.allclose(head(given).logits, turned(HeadInput(sets, [])).logits, atol=1e-6)


def test_sets_that_start_alike_stay_alike_and_drawn_ones_do_not() -> None:
    """So first weights must differ: twins have equal gradients for ever."""
    sizes = sizes_of({name: [8] for name in "01"}, ONE_TASK)
    given = drawn_input(sizes)
    twins = HeadInput({"0": given.sets["0"], "1": [given.sets["0"][0].detach().requires_grad_()]}, [])
    for alike in (True, False):
        head = head_of(sizes)
        bank: Any = head.layers[0].banks["shared"]["8"]
        if alike:
            with torch.no_grad():
                bank.layers[0].weight[1], bank.layers[0].bias[1] = (
                    bank.layers[0].weight[0],
                    bank.layers[0].bias[0],
                )
            bank.norms[1].load_state_dict(bank.norms[0].state_dict())
        a, b = torch.autograd.grad(head(twins).logits.sum(), twins.parts)
        assert torch.equal(a, b) is alike


# AME


def test_sets_of_different_widths_are_projected_and_weighed_by_each_task() -> None:
    """AME: sets with their own width, one projection a set, one gate a task, and no stopped gradient."""
    sizes = sizes_of({"narrow": [4], "middle": [8], "wide": [16]}, beside=2)
    head, given = head_of(sizes, mixer={"kind": "softmax"}), drawn_input(sizes)
    layer: Any = head.layers[0]
    inputs = [torch.cat([*given.sets[name], *given.beside], 1) for name in sizes.sets]
    outputs = [layer_of(layer.banks["shared"][str(x.shape[1])], 0, x) for x in inputs]
    for column, task in enumerate(("click", "buy")):
        gate = layer.mixer.gates[f"task_{task}"]
        weight_CM = gate.layers[0](gate.norm(torch.cat(given.parts, 1))).softmax(1)
        mixed = sum(w[:, None] * x for w, x in zip(weight_CM.unbind(1), outputs, strict=True))
        found = head(given).logits[:, column]
        assert torch.allclose(found, tower_of(head, task, mixed), atol=1e-5)
        for gradient in torch.autograd.grad(found.sum(), given.parts):
            assert gradient.abs().max() > 0


# Crocodile

CROCODILE = {
    "experts": {"hidden": [5], "covariance": 0.1},
    "mixer": {"kind": "softmax", "axis": "element", "gate": "prior", "per": "domain"},
    "towers": {"per": "domain"},
}


def test_gates_of_a_prior_weigh_every_element_of_every_candidate() -> None:
    sizes = sizes_of({name: [8] for name in "012"}, ONE_TASK, prior=4, domains=3)
    head, given = head_of(sizes, **CROCODILE), drawn_input(sizes)
    weights: list[Tensor] = []
    layer: Any = head.layers[0]
    gate = layer.mixer.gates["task_click"]
    gate.register_forward_hook(lambda _, __, weight: weights.append(weight))
    found = head(given).logits
    assert weights[0].shape == (7, 3, 5)
    assert torch.allclose(weights[0].sum(1), torch.ones(7, 5), atol=1e-6)
    # t^s = sum_p softmax(r W^s)_p * O^p, then the tower of the domain.
    assert given.prior is not None and given.domain is not None
    for c, domain in enumerate(given.domain.tolist()):
        maps, tower = gate.layers[0], head.towers["task_click"]
        weight = (maps.weight[domain] @ given.prior[c] + maps.bias[domain]).view(3, 5).softmax(0)
        outputs = [layer_of(layer.banks["shared"]["8"], p, given.sets[str(p)][0][c], p) for p in range(3)]
        x = (weight * torch.stack(outputs)).sum(0)
        first, last = tower.layers  # type: ignore[union-attr]
        x = F.linear(x, first.weight[domain], first.bias[domain])
        x = F.linear(tower.slopes[0](x), last.weight[domain], last.bias[domain])  # type: ignore[union-attr,index]
        assert torch.allclose(found[c], x, atol=1e-5)


def test_constant_gates_are_the_mean_of_multi_embedding() -> None:
    sizes = sizes_of({name: [8] for name in "012"}, ONE_TASK, prior=4, domains=3)
    gated, given = head_of(sizes, **CROCODILE), drawn_input(sizes)
    for parameter in gated.layers[0].mixer.parameters():  # type: ignore[union-attr,operator]
        nn.init.zeros_(parameter)
    mean = head_of(sizes, experts={"hidden": [5]}, towers={"per": "domain"})
    loaded = mean.load_state_dict(gated.state_dict(), strict=False)
    assert not loaded.missing_keys and all(".gates." in key for key in loaded.unexpected_keys)
    assert torch.allclose(gated(given).logits, mean(given).logits, atol=1e-6)


def test_only_shared_experts_of_the_first_layer_are_said_for_their_covariance() -> None:
    sizes = stem_sizes()
    settings = stacked(STEM, 2)
    settings["experts"] |= {"covariance": 0.1, "shared": 2, "hidden": [5]}
    head, given = head_of(sizes, **settings), drawn_input(sizes)
    outputs, _ = head.layers[0]([torch.cat(parts, 1) for parts in given.sets.values()], None)
    found = head(given).experts
    assert found is not None and torch.equal(found, torch.stack(outputs[:2], 1)) and found.shape == (7, 2, 5)
    assert head.eval()(given).experts is None
    assert head_of(sizes, **STEM)(given).experts is None


# STEM


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_no_task_trains_what_another_owns(layers: int) -> None:
    """Isolation, also where layers are stacked: the published shared mixture is masked too.

    A foreign set and foreign experts, gates and towers do not move; what is shared does, for each task.
    """
    sizes = stem_sizes(beside=2)
    head, given = head_of(sizes, **stacked(STEM, layers)), drawn_input(sizes)
    for column, (task, other) in enumerate((("click", "buy"), ("buy", "click"))):
        loss = head(given).logits[:, column].square().sum()
        inputs = {name: parts[0] for name, parts in given.sets.items()}
        parameters = dict(head.named_parameters())
        found = torch.autograd.grad(loss, [*inputs.values(), *parameters.values()], allow_unused=True)
        gradients = dict(zip([*inputs, *parameters], found, strict=True))
        assert not moves(gradients[other])
        assert not any(moves(gradients[name]) for name in parameters if f"task_{other}" in name)
        reached = [gradients["shared"], gradients[task]]
        reached += [
            gradient for name, gradient in gradients.items() if ".shared." in name or f"task_{task}" in name
        ]
        assert all(moves(gradient) for gradient in reached)


def test_with_open_experts_the_same_test_of_isolation_fails() -> None:
    sizes = stem_sizes()
    head, given = head_of(sizes, **OPEN), drawn_input(sizes)
    (gradient,) = torch.autograd.grad(head(given).logits[:, 0].sum(), given.sets["buy"])
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("layers", [1, 2])
def test_the_mask_changes_gradients_and_no_value(layers: int) -> None:
    sizes = stem_sizes()
    masked, open_ = (
        head_of(sizes, **stacked(settings, layers))
        for settings in (STEM, {**STEM, **{"experts": {"own": 1}}})
    )
    given = drawn_input(sizes)
    assert torch.equal(masked(given).logits, open_(given).logits)


@pytest.mark.parametrize("layers", [1, 2])
def test_every_task_reads_every_foreign_set(layers: int) -> None:
    sizes = stem_sizes()
    head, given = head_of(sizes, **stacked(STEM, layers)), drawn_input(sizes)
    for column, other in enumerate(("buy", "click")):
        moved = replace(given, sets={**given.sets, other: [given.sets[other][0].flip(1)]})
        assert (head(given).logits - head(moved).logits)[:, column].abs().min() > 1e-4


def test_a_stem_gate_reads_the_sum_of_own_and_shared_set() -> None:
    """One layer against the equations, expert by expert."""
    sizes = stem_sizes()
    head, given = head_of(sizes, **STEM), drawn_input(sizes)
    layer: Any = head.layers[0]
    x = {name: parts[0] for name, parts in given.sets.items()}
    seen = [
        layer_of(layer.banks[f"task_{name}" if name != "shared" else name]["8"], 0, x[name])
        for name in STEM_SETS
    ]
    for column, task in enumerate(("click", "buy")):
        gate = layer.mixer.gates[f"task_{task}"]
        hidden = gate.layers[0](gate.norm(x[task] + x["shared"])).relu()
        weight_CV = gate.layers[1](hidden).softmax(1)
        mixed = (weight_CV[:, :, None] * torch.stack(seen, 1)).sum(1)
        assert torch.allclose(head(given).logits[:, column], tower_of(head, task, mixed), atol=1e-5)


# MMoE, PLE, PEPNet


def test_mmoe_is_experts_of_one_input_with_a_gate_for_each_task() -> None:
    sizes = sizes_of({"": [8, 4]}, beside=2)
    head = head_of(sizes, experts={"shared": 3, "hidden": [7, 5]}, mixer={"kind": "softmax"})
    given = drawn_input(sizes)
    x, layer = torch.cat(given.parts, 1), head.layers[0]
    bank: Any = layer.banks["shared"]["14"]  # type: ignore[union-attr,index]
    outputs = torch.stack([layer_of(bank, expert, x) for expert in range(3)], 1)
    for column, task in enumerate(("click", "buy")):
        gate: Any = layer.mixer.gates[f"task_{task}"]  # type: ignore[union-attr,index]
        mixed = (gate.layers[0](gate.norm(x)).softmax(1)[:, :, None] * outputs).sum(1)
        assert torch.allclose(head(given).logits[:, column], tower_of(head, task, mixed), atol=1e-5)


def test_ple_stacks_experts_of_tasks_and_shared_ones() -> None:
    """Two layers: a task reads its own and the shared experts; the shared mixture of layer one reads all."""
    sizes = sizes_of({"": [8]})
    head, given = head_of(sizes, **stacked(PLE, 2)), drawn_input(sizes)
    streams = dict.fromkeys(("shared", "click", "buy"), given.parts[0])
    for number in range(2):
        layer: Any = head.layers[number]
        outputs = {}
        for name, x in streams.items():
            key = name if name == "shared" else f"task_{name}"
            bank = layer.banks[key][str(x.shape[1])]
            outputs[name] = [layer_of(bank, expert, x) for expert in range(2)]
        mixed = {}
        for name, x in streams.items():
            key = name if name == "shared" else f"task_{name}"
            if key not in layer.mixer.gates:
                assert name == "shared" and number == 1
                continue
            read = x if number == 0 or name == "shared" else x + streams["shared"]
            others = ["click", "buy"] if name == "shared" else [name]
            seen = torch.stack(outputs["shared"] + [x for other in others for x in outputs[other]], 1)
            gate = layer.mixer.gates[key]
            mixed[name] = (gate.layers[0](gate.norm(read)).softmax(1)[:, :, None] * seen).sum(1)
        streams = mixed
    for column, task in enumerate(("click", "buy")):
        assert torch.allclose(head(given).logits[:, column], tower_of(head, task, streams[task]), atol=1e-5)


def test_pepnet_scales_inputs_and_layers_by_gates_of_the_prior() -> None:
    """EPNet: O_ep = 2 sigmoid(..) * E. PPNet: the input of every layer of a tower, by what reads O_ep."""
    sizes = sizes_of({"": [8]}, prior=4)
    settings = {"experts": {"hidden": [], "norm": "none"}, "towers": {"gated": True, "gate_inputs": True}}
    head, given = head_of(sizes, **settings), drawn_input(sizes)
    (e,), prior = given.parts, given.prior
    assert prior is not None

    def factors(gate: Any, x: Tensor) -> Tensor:
        return 2 * torch.sigmoid(gate.factors(F.relu(gate.hidden(torch.cat([prior, x.detach()], 1)))))

    o_ep = factors(head.input_gates["set"], e) * e
    logits = []
    for task in ("click", "buy"):
        tower: Any = head.towers[f"task_{task}"]
        scale = factors(tower.gate, o_ep)
        h = tower.slopes[0](tower.layers[0](scale[:, :8] * o_ep))
        logits.append(tower.layers[1](scale[:, 8:] * h))
    found = head(given).logits
    assert torch.allclose(found, torch.cat(logits, 1), atol=1e-5)
    # The gates read what they scale without training it.
    ours, plain = (
        torch.autograd.grad(each.sum(), e, retain_graph=True)[0] for each in (found, torch.cat(logits, 1))
    )
    assert torch.allclose(ours, plain, atol=1e-5)
    of_prior = torch.autograd.grad(found.sum(), prior)[0]
    assert of_prior.abs().max() > 0


def test_shared_bottom_is_one_expert_and_a_tower_for_each_task() -> None:
    tasks = tasks_of("click", "buy", buy={"tower": [3, 2]})
    sizes = sizes_of({"": [8]}, tasks)
    head, given = head_of(sizes), drawn_input(sizes)
    bank: Any = head.layers[0].banks["shared"]["8"]
    mixed = layer_of(bank, 0, given.parts[0])
    for column, task in enumerate(("click", "buy")):
        assert torch.allclose(head(given).logits[:, column], tower_of(head, task, mixed), atol=1e-6)
    widths = {name: [layer.out_features for layer in tower.layers] for name, tower in head.towers.items()}
    assert widths == {"task_click": [6, 1], "task_buy": [3, 2, 1]}


# Sets of domains


@pytest.mark.parametrize("kind", ["mean", "sum", "softmax"])
def test_the_experts_of_a_domain_are_for_its_own_candidates(kind: str) -> None:
    sizes = sizes_of({name: [8] for name in "abc"}, ONE_TASK, {"b": "domain:0", "c": "domain:2"}, domains=3)
    head, given = head_of(sizes, mixer={"kind": kind}), drawn_input(sizes)
    gradients = torch.autograd.grad(head(given).logits.square().sum(), given.parts)
    assert given.domain is not None and set(given.domain.tolist()) == {0, 1, 2}
    for owner, gradient in zip((None, 0, 2), gradients, strict=True):
        reached = gradient.abs().sum(1) > 0
        assert torch.equal(reached, torch.ones_like(reached) if owner is None else given.domain == owner)
    layer: Any = head.layers[0]
    nobody = replace(given, domain=torch.full_like(given.domain, 1))
    alone = layer_of(layer.banks["shared"]["8"], 0, given.parts[0])
    assert torch.allclose(head(nobody).logits[:, 0], tower_of(head, "click", alone), atol=1e-5)


# What a loss reaches


CASES = [
    *((STEM, layers, stem_sizes(prior=3)) for layers in (1, 2, 3)),
    *((OPEN, layers, stem_sizes()) for layers in (1, 2, 3)),
    *((PLE, layers, sizes_of({"": [8]})) for layers in (1, 2, 3)),
    *((PLE, layers, stem_sizes(prior=3)) for layers in (1, 2)),
    ({"mixer": {"kind": "softmax"}, "experts": {"shared": 2}}, 2, sizes_of({"": [8]})),
]


@pytest.mark.parametrize(("settings", "layers", "sizes"), CASES)
def test_own_parameters_are_those_that_one_loss_alone_reaches(
    settings: dict[str, Any], layers: int, sizes: HeadSizes
) -> None:
    gates = {"towers": {"gate_inputs": True}} if sizes.prior else {}
    head, given = head_of(sizes, **stacked(settings, layers), **gates), drawn_input(sizes)
    names = {id(parameter): name for name, parameter in head.named_parameters()}
    reached = []
    for column in range(2):
        loss = head(given).logits[:, column].sum()
        gradients = torch.autograd.grad(loss, list(head.parameters()), allow_unused=True)
        reached.append(
            {name for name, gradient in zip(names.values(), gradients, strict=True) if moves(gradient)}
        )
    assert set.union(*reached) == set(names.values()), "every parameter is trained"
    for task, alone in (("click", reached[0] - reached[1]), ("buy", reached[1] - reached[0])):
        own = [names[id(parameter)] for parameter in head.own_parameters(task)]
        assert set(own) == alone and len(own) == len(alone)


def test_two_logits_a_task_where_a_task_trains_two() -> None:
    jrc = tasks_of("click", "buy", buy={"rank": "jrc"})
    sizes = sizes_of({"": [8]}, jrc)
    output = head_of(sizes)(drawn_input(sizes))
    assert output.base is not None and output.logits.shape == output.base.shape == (7, 2)
    tower: Any = head_of(sizes).towers["task_click"]
    assert tower.layers[-1].out_features == 2


def test_gates_report_mean_weights_and_their_entropy() -> None:
    sizes = stem_sizes()
    head, given = head_of(sizes, **stacked(STEM, 2)), drawn_input(sizes)
    reports = head.gate_reports(given)
    assert set(reports) == {"0/shared", "0/task:click", "0/task:buy", "1/task:click", "1/task:buy"}
    for report in reports.values():
        assert list(report.weights) == ["shared/0", "task:click/0", "task:buy/0"]
        assert sum(report.weights.values()) == pytest.approx(1)
        assert 0 < report.entropy < math.log(3)
    assert head_of(sizes_of({"": [8]})).gate_reports(drawn_input(sizes_of({"": [8]}))) == {}
    for parameter in head.layers[0].mixer.parameters():  # type: ignore[union-attr,operator]
        nn.init.zeros_(parameter)
    even = head.gate_reports(given)["0/task:click"]
    assert even.entropy == pytest.approx(math.log(3)) and even.weights["shared/0"] == pytest.approx(1 / 3)


def test_half_precision_gives_finite_logits() -> None:
    sizes = sizes_of({name: [8] for name in "012"}, ONE_TASK, prior=4, domains=3)
    head, given = head_of(sizes, **CROCODILE), drawn_input(sizes)
    with torch.autocast("cpu", torch.bfloat16):
        half = head(given)
    assert torch.allclose(half.logits.float(), head(given).logits, atol=0.3)
    half.logits.float().square().sum().backward()
    assert all(
        torch.isfinite(parameter.grad).all() for parameter in head.parameters() if parameter.grad is not None
    )


@pytest.mark.parametrize("gate", [{"kind": "softmax"}, {"kind": "mean"}, {"kind": "sum"}])
def test_half_precision_weighs_and_adds_up_in_single(gate: dict[str, str]) -> None:
    """Mixtures are exactly those of what the experts gave; what leaves the head is float32."""
    tasks = tasks_of("click", "buy", buy={"rank": "jrc"})
    sizes = sizes_of({name: [8] for name in "012"}, tasks, prior=4)
    settings = {"experts": {"hidden": [5], "covariance": 0.1}, "mixer": gate, "towers": {"gated": True}}
    head, given = head_of(sizes, **settings), drawn_input(sizes)
    layer: Any = head.layers[0]
    seen: dict[str, Any] = {}
    layer.register_forward_hook(lambda _, __, found: seen.update(layer=found))
    for key, part in layer.mixer.gates.items():
        part.register_forward_hook(lambda _, __, weight, key=key: seen.update({key: weight}))
    head.towers["task_buy"].gate.register_forward_hook(lambda _, __, found: seen.update(factors=found))  # type: ignore[union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        output = head(given)
    outputs, mixtures = seen["layer"]
    stacked_CVD = torch.stack(outputs, 1).float()
    assert outputs[0].dtype == torch.bfloat16, "products are halved"
    weights = {"mean": 1 / 3, "sum": 1.0}
    weight = seen["task_buy"] if gate["kind"] == "softmax" else weights[gate["kind"]]
    assert torch.allclose(mixtures["task:buy"], (weight * stacked_CVD).sum(1), atol=1e-6)
    every = [output.logits, output.base, output.experts, mixtures["task:buy"], seen["factors"]]
    assert all(part.dtype == torch.float32 for part in every)


def test_one_model_for_every_section() -> None:
    """What is set is what is built: no key is dropped."""
    model = model_with(experts={"net": "cross", "crosses": 3, "hidden": [9, 5]}, mixer={"kind": "sum"})
    head = ExpertsHead.build(model, sizes_of({"": [8]}))
    shapes = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    prefix = "layers.0.banks.shared.8"
    assert shapes[f"{prefix}.net.crosses.2.weight"] == (1, 8, 8)
    assert shapes[f"{prefix}.layers.0.weight"] == (1, 9, 8)
    assert shapes[f"{prefix}.layers.1.weight"] == (1, 5, 9)
    assert shapes["towers.task_buy.layers.0.weight"] == (6, 5)


TWO = {"a": [8], "b": [4]}


@pytest.mark.parametrize(
    ("sections", "sizes", "message"),
    [
        ({"towers": {"per": "domain"}}, sizes_of(TWO), 'model.towers.per = "domain" needs data.domain'),
        (
            {"mixer": {"kind": "softmax", "per": "domain"}},
            sizes_of(TWO),
            'model.mixer.per = "domain" needs data.domain',
        ),
        (
            {},
            sizes_of(TWO, owners={"b": "task:buy"}),
            "groups.representation.sets.b.owner = 'task:buy': tasks have no experts that could read the set",
        ),
        (
            {"experts": {"own": 1}},
            sizes_of(TWO, owners={"a": "domain:0", "b": "task:buy"}, domains=2),
            "all sets have owners, so task 'click' would have nothing to read",
        ),
        (
            {"experts": {"own": 1}},
            sizes_of(TWO, owners={"a": "domain:0", "b": "domain:1"}, domains=2),
            "model.experts.own = 1: task 'click' would have no experts of its own",
        ),
        (
            {"mixer": {"kind": "softmax"}},
            sizes_of(TWO, owners={"a": "domain:0", "b": "domain:1"}, domains=2),
            "the gate of task 'click' reads shared sets and those of the task, and there are none",
        ),
        (
            {"experts": {"own": 1, "layers": 2}},
            sizes_of(TWO, owners={"a": "task:click", "b": "task:buy"}),
            "all sets have owners, so layers above the first would have nothing to read",
        ),
        (
            {"experts": {"covariance": 0.1}},
            sizes_of({"": [8]}),
            "covariance is about pairs of shared experts",
        ),
        ({"experts": {"hidden": []}}, sizes_of(TWO), "hidden = \\[\\] needs sets of one width"),
        ({"experts": {"net": "fm"}}, sizes_of(TWO), "cuts a set into fields"),
    ],
)
def test_what_sets_and_domains_do_not_have_is_refused(
    sections: dict[str, Any], sizes: HeadSizes, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        head_of(sizes, **sections)


def test_a_task_without_shared_sets_reads_its_own() -> None:
    sizes = sizes_of({"a": [8], "b": [8]}, owners={"a": "task:click", "b": "task:buy"})
    head, given = (
        head_of(sizes, experts={"own": 1, "foreign": "hidden"}, mixer={"kind": "softmax"}),
        drawn_input(sizes),
    )
    for column, (own, other) in enumerate(("ab", "ba")):
        loss = head(given).logits[:, column].sum()
        a, b = torch.autograd.grad(loss, [*given.sets[own], *given.sets[other]], allow_unused=True)
        assert moves(a) and not moves(b)
