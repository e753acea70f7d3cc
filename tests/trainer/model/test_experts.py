"""Several sets of the representation: the search runs once, and each is read as if it were alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.inputs.tables import initialise_unsharded
from embeddings.errors import ConfigError
from embeddings.lookup.plain import PlainBagCollection
from tests.helpers.logs import FEATURES, random_rows, write_log
from tests.trainer.model.test_frame import batch_of, config
from trainer.assemble import build_model
from trainer.config.tasks import Task, resolve_tasks
from trainer.data.batch import RequestBatch
from trainer.model.frame import TwoStageModel
from trainer.run_config import build_groups

ONE_TASK = resolve_tasks({}, ["click"])
SETS = {"one": {}, "other": {"dim": 12}}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write_log(tmp_path / "log", {"train": random_rows(7)})


def model_with(
    log: Path, sets: Any, lookup: str = "selected", tasks: Sequence[Task] = ONE_TASK, **model: Any
) -> tuple[TwoStageModel, RequestBatch]:
    """The same weights of a set whoever is there."""
    representation = {"dim": 8, "init_scale": 1.0, "sets": sets}
    settings = config(
        log,
        {"attention": {"dim": 4, "init_scale": 1.0}, "representation": representation},
        lookup=lookup,
        **model,
    )
    groups = build_groups(settings, FEATURES, tasks=tasks)
    weights = {g.table_name(t): torch.empty(t.rows, t.dim) for g in groups.values() for t in g.tables}
    collections = {name: PlainBagCollection(group, weights, True) for name, group in groups.items()}
    made = build_model(settings, groups, collections, tasks)
    initialise_unsharded(made, groups, 1)
    for name, parameter in made.branches.named_parameters():
        nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    return made, batch_of(settings)


def run(model: TwoStageModel, batch: RequestBatch) -> tuple[dict[str, list[Tensor]], dict[str, int]]:
    """What the head is given, and how often whom was called; then a backward pass that all take part in."""
    parts: dict[str, list[Tensor]] = {}
    calls: dict[str, int] = {}
    model.pooling.register_forward_hook(lambda _, __, found: parts.update(found.given[0].sets))
    once = {"search": model.branches["main"].search, **model.collections}
    for name, module in once.items():
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    model(batch).logits.square().sum().backward()
    return parts, calls


def gradients(model: TwoStageModel, set_: str) -> list[Tensor | None]:
    tables = model.collections["representation"].named_parameters()
    return [table.grad for name, table in tables if f"/{set_}/" in name]


@pytest.mark.parametrize("lookup", ["selected", "full"])
def test_sets_share_one_search_and_one_lookup_and_change_nothing_of_each_other(
    log: Path, lookup: str
) -> None:
    found = []
    for names in (("one", "other"), ("one",), ("other",)):
        model, batch = model_with(log, {name: SETS[name] for name in names}, lookup)
        parts, calls = run(model, batch)
        assert calls == {"search": 1, "attention": 1, "representation": 1}
        assert list(parts) == list(names)
        reached = [gradient for name in names for gradient in gradients(model, name)]
        assert len(reached) == 2 * len(names)
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in reached)
        found.append(parts)
    both, first, second = found
    assert [part.shape[1] for parts in both.values() for part in parts] == [16, 16, 16, 24, 24, 24]
    for name, alone in (("one", first), ("other", second)):
        assert all(torch.equal(a, b) for a, b in zip(both[name], alone[name], strict=True))
        assert both[name][1].abs().max() > 0


def loss_of(parts: dict[str, list[Tensor]]) -> Tensor:
    """The mean over sets of a loss that is the same function of each."""
    sums = [sum((part.sigmoid() * part).sum() for part in own) for own in parts.values()]
    return torch.stack(sums).mean()


def given_to_head(model: TwoStageModel, batch: RequestBatch) -> dict[str, list[Tensor]]:
    found: list[dict[str, list[Tensor]]] = []
    hook = model.pooling.register_forward_hook(lambda _, __, pooled: found.append(pooled.given[0].sets))
    model(batch)
    hook.remove()
    return found[0]


def of_set(model: TwoStageModel, name: str) -> dict[str, nn.Parameter]:
    """What belongs to a set alone, by the names that it has in all of them."""
    found = {}
    for key, parameter in model.named_parameters():
        for mark in (f"/{name}/", f".sequences.{name}."):
            if mark in key:
                found[key.replace(mark, mark.replace(name, "*"))] = parameter
    return found


def test_one_named_set_is_the_model_without_sets_bit_for_bit(log: Path) -> None:
    plain, batch = model_with(log, 1)
    named, _ = model_with(log, {"only": {}})
    unnamed = {
        key.replace("/*/", "__").replace(".sequences.*.", ".sequence."): parameter
        for key, parameter in of_set(named, "only").items()
    }
    own = dict(plain.named_parameters())
    assert unnamed.keys() == {key for key in own if "representation" in key or ".sequence." in key}
    both = {**dict(named.named_parameters()), **unnamed}
    with torch.no_grad():
        for key, parameter in own.items():
            both[key].copy_(parameter)
    (a,), (b,) = (list(given_to_head(model, batch).values()) for model in (plain, named))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert torch.equal(plain(batch).logits, named(batch).logits)


def test_sets_that_begin_alike_stay_alike_and_others_differ(log: Path) -> None:
    for alike in (True, False):
        model, batch = model_with(log, 2, projection="feature", time_target="shared")
        first, second = of_set(model, "0"), of_set(model, "1")
        assert first.keys() == second.keys() and len(first) > 5
        with torch.no_grad():
            for key, parameter in first.items() if alike else ():
                second[key].copy_(parameter)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(given_to_head(model, batch)).backward()
            optimizer.step()
        tables = [key for key in first if "representation" in key]
        assert tables and all(torch.equal(first[key], second[key]) == alike for key in tables)


def test_the_order_of_sets_does_not_matter(log: Path) -> None:
    """Weights go with their names."""
    one, batch = model_with(log, {"a": {}, "b": {"dim": 12}, "c": {}})
    other, _ = model_with(log, {"c": {}, "a": {}, "b": {"dim": 12}})
    assert {n: p.shape for n, p in one.named_parameters() if "head" not in n} == {
        n: p.shape for n, p in other.named_parameters() if "head" not in n
    }
    found, expected = given_to_head(other, batch), given_to_head(one, batch)
    assert list(found) == ["c", "a", "b"] and list(expected) == ["a", "b", "c"]
    for name, parts in expected.items():
        assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(found[name], parts, strict=True))


@pytest.mark.parametrize("lookup", ["selected", "full"])
def test_the_gradient_of_one_set_reaches_no_other(log: Path, lookup: str) -> None:
    model, batch = model_with(log, {"a": {}, "b": {}}, lookup, projection="feature")
    sets = given_to_head(model, batch)
    for name, other in (("a", "b"), ("b", "a")):
        model.zero_grad()
        loss_of({name: sets[name]}).backward(retain_graph=True)
        own, foreign = (list(of_set(model, key).values()) for key in (name, other))
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in own)
        assert all(p.grad is None or p.grad.abs().max() == 0 for p in foreign)


def test_the_auxiliary_loss_reads_shared_sets_alone(log: Path) -> None:
    """Else every task's loss would train what another owns."""
    sets = {"shared": {}, "click": {"owner": "task:click"}, "more": {"dim": 12}}
    owners = {"head": "experts", "experts": {"own": 1}}
    model, batch = model_with(log, sets, "full", auxiliary="softmax", **owners)
    model.train()(batch).auxiliary.square().sum().backward()
    for name in sets:
        reached = any(p.grad is not None and p.grad.abs().max() > 0 for p in of_set(model, name).values())
        assert reached == (name != "click")
    assert model.auxiliary.head.layers[0].normalized_shape == (3 * (16 + 24),)


def test_sets_without_a_shared_one_leave_nothing_to_the_auxiliary_loss(log: Path) -> None:
    with pytest.raises(ConfigError, match=r'model\.auxiliary = "softmax" is a loss of all tasks'):
        model_with(log, {"mine": {"owner": "task:click"}}, "full", auxiliary="softmax", head="experts")


def test_a_set_is_called_like_no_attribute_of_a_module(log: Path) -> None:
    with pytest.raises(ConfigError, match=r"groups\.representation\.sets: .* 'apply' .* another name"):
        model_with(log, {"apply": {}, "other": {}})


def test_every_set_must_suit_the_sequence_model(log: Path) -> None:
    sasrec = {"sequence": "sasrec", "time_group": "category_id", "heads": 3}
    with pytest.raises(ConfigError, match="heads = 3 does not divide the representation's width 16"):
        model_with(log, {"a": {"dim": 12}, "b": {}}, **sasrec)


def test_with_a_mean_of_experts_the_order_of_sets_changes_no_prediction(log: Path) -> None:
    """Of the whole model; experts lie in the order of their sets."""
    order = {"c": 2, "a": 0, "b": 1}
    one, batch = model_with(log, {"a": {}, "b": {}, "c": {}}, head="experts", hidden=[8])
    other, _ = model_with(log, {name: {} for name in order}, head="experts", hidden=[8])
    given = dict(one.named_parameters())
    with torch.no_grad():
        for number, norm in enumerate(
            given[f"head.layers.0.banks.shared.48.norms.{n}.weight"] for n in range(3)
        ):
            norm.fill_(number + 0.5)
        for key, parameter in other.named_parameters():
            moved = given[key]
            if ".norms." in key:
                place = int(key.split(".norms.")[1][0])
                moved = given[key.replace(f".norms.{place}.", f".norms.{[*order.values()][place]}.")]
            elif ".banks." in key:
                moved = moved[list(order.values())]
            parameter.copy_(moved)
    assert torch.allclose(other(batch).logits, one(batch).logits, atol=1e-6)
    assert one(batch).logits.std() > 1e-3
    with torch.no_grad():
        given["head.layers.0.banks.shared.48.layers.0.weight"][0] *= 2
    assert not torch.allclose(other(batch).logits, one(batch).logits, atol=1e-4)
