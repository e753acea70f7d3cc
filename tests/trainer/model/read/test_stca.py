"""STCA against its equations, one candidate and one behavior at a time, and what must not matter to it."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.models import BEHAVIORS, MARK_ROWS, draw, drawing, drawn_behaviors, drawn_windows
from tests.helpers.stretches import check_empty_history
from trainer.model.read.sequence import Behaviors
from trainer.model.read.stca import SwiGlu, TargetToHistory
from trainer.model.time import TimeEncoding
from trainer.model.windows import Windows

WIDTH, HIDDEN = 8, 12


def made(rng: torch.Generator, heads: int = 2, layers: int = 2, aware: bool = True) -> TargetToHistory:
    times = [TimeEncoding(MARK_ROWS, 2 * WIDTH) for _ in range(layers)]
    model = TargetToHistory(WIDTH, heads, HIDDEN, times, aware)
    draw(model, rng)
    return model


def drawn(rng: torch.Generator, windows: int = 3, width: int = 7, candidates: int = 5) -> Behaviors:
    return drawn_behaviors(rng, drawn_windows(rng, windows, width, candidates), WIDTH, whole=True)


def swiglu(layer: SwiGlu, part: Tensor) -> Tensor:
    plain, gate = layer.enter.weight[:HIDDEN] @ part, layer.enter.weight[HIDDEN:] @ part
    return layer.leave.weight @ (plain * gate * torch.sigmoid(gate))


def pooled_reference(model: TargetToHistory, behaviors: Behaviors, c: int) -> Tensor:
    """z of one candidate, by docs/specs/stca.md."""
    windows, size = behaviors.windows, WIDTH // model.heads
    w = int(windows.of_candidate[c])
    target = behaviors.target_CD[c]
    outputs: list[Tensor] = []
    for layer in model.layers:
        mixed = torch.cat([*outputs, target])
        mixed = target if layer.compress is None else layer.compress.weight @ mixed
        query = layer.query.weight @ layer.of_query[1](swiglu(layer.of_query[0], mixed))
        scores, values = [], []
        for x in torch.nonzero(windows.mask[w]).flatten():
            row = behaviors.value_SD[behaviors.place[w, x]]
            history = layer.of_history[1](swiglu(layer.of_history[0], row))
            time = sum(layer.time.tables[name][getattr(windows.marks, name)[w, x]] for name in MARK_ROWS)
            key = layer.key.weight @ history + time[:WIDTH]
            values.append((layer.value.weight @ history + time[WIDTH:]).view(model.heads, size))
            scores.append((query * key).view(model.heads, size).sum(1) / size**0.5)
        if values:
            share = torch.stack(scores).softmax(0)
            read = (share[:, :, None] * torch.stack(values)).sum(0).flatten()
            outputs.append(layer.out.weight @ read)
        else:
            outputs.append(torch.zeros(WIDTH))
    return swiglu(model.pool, model.unite.weight @ torch.cat([*outputs, target]))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    windows=st.integers(1, 4),
    width=st.integers(1, 8),
    candidates=st.integers(0, 5),
    heads=st.sampled_from([1, 2, 4]),
    layers=st.integers(1, 3),
    aware=st.booleans(),
)
@torch.no_grad()
def test_parts_follow_the_equations(
    seed: int, windows: int, width: int, candidates: int, heads: int, layers: int, aware: bool
) -> None:
    """Empty windows and windows of nobody among them."""
    rng = drawing(seed)
    model, behaviors = made(rng, heads, layers, aware), drawn(rng, windows, width, candidates)
    target, pooled, *product = model(behaviors, None)
    assert torch.equal(target, behaviors.target_CD)
    for c in range(candidates):
        wanted = pooled_reference(model, behaviors, c)
        assert torch.allclose(pooled[c], wanted, rtol=1e-4, atol=1e-4)
    assert [part.equal(target * pooled) for part in product] == [True] * aware
    assert model.output_width == sum(part.shape[1] for part in model(behaviors, None))


def in_order(windows: Windows, order: Tensor) -> Windows:
    marks = windows.marks.each(lambda part: part[:, order])
    return replace(windows, index=windows.index[:, order], mask=windows.mask[:, order], marks=marks)


@torch.no_grad()
def test_a_history_is_a_set_of_behaviors_and_their_ages() -> None:
    rng = drawing(2)
    model, behaviors = made(rng), drawn(rng)
    moved = in_order(behaviors.windows, torch.randperm(7, generator=rng))
    shuffled = replace(behaviors, windows=moved, place=moved.index)
    assert torch.allclose(model(behaviors, None)[1], model(shuffled, None)[1], atol=1e-5)
    # Ages that stay where they were belong to other behaviors.
    aged = replace(moved, marks=behaviors.windows.marks)
    other = replace(shuffled, windows=aged)
    assert not torch.allclose(model(behaviors, None)[1], model(other, None)[1], atol=1e-3)


def alone(behaviors: Behaviors, c: int, more: int) -> Behaviors:
    """One candidate with its window, padded by `more` columns of another window's behaviors."""
    w = int(behaviors.windows.of_candidate[c])
    one = behaviors.windows

    def cut(part: Tensor, padding: int) -> Tensor:
        return F.pad(part[w : w + 1], (0, more), value=padding)

    marks = one.marks.each(lambda part: cut(part, 1))
    windows = Windows(cut(one.index, 3), cut(one.mask, 0), marks, None, torch.zeros(1, dtype=torch.int64))
    target_CD = behaviors.target_CD[c : c + 1]
    return replace(behaviors, windows=windows, place=windows.index, target_CD=target_CD)


@torch.no_grad()
def test_a_candidate_depends_on_itself_and_its_window_alone() -> None:
    rng = drawing(3)
    model, behaviors = made(rng), drawn(rng)
    together = model(behaviors, None)[1]
    for c in range(5):
        for more in (0, 4):
            assert torch.allclose(model(alone(behaviors, c, more), None)[1][0], together[c], atol=1e-5)


def test_keys_and_values_are_made_once_a_behavior_and_each_of_them_alone() -> None:
    """Whatever the windows and candidates; a behavior that changes moves its own row and no other."""
    rng = drawing(4)
    model, behaviors = made(rng), drawn(rng, windows=9, width=20, candidates=40)
    layer, seen = model.layers[0], []
    compute = layer.remembered
    with patch.object(layer, "remembered", lambda given: seen.append(given.shape) or compute(given)):
        model(behaviors, None)
    assert seen == [(BEHAVIORS, WIDTH)]
    changed = behaviors.value_SD.clone()
    changed[5] += 1
    moved = (layer.remembered(changed) - layer.remembered(behaviors.value_SD)).abs().amax(1) > 1e-3
    assert torch.nonzero(moved).flatten().tolist() == [5]


def test_an_empty_history_gives_numbers_and_gradients() -> None:
    rng = drawing(5)
    model, behaviors = made(rng), drawn(rng)
    check_empty_history(model, behaviors)
    assert not model.layers[0].out.weight.grad.any()


@torch.no_grad()
def test_the_candidates_own_item_has_the_largest_share_at_the_start() -> None:
    """Query and keys start with the same maps, and of vectors of one length an equal one is nearest."""
    torch.manual_seed(1)
    model = TargetToHistory(32, 1, 64, [TimeEncoding({}, 64)], False)
    layer, rows = model.layers[0], torch.randn(200, 32)
    key = layer.remembered(rows)[:, :32]
    best = (layer.asked([rows]) @ key.T).argmax(1)
    assert (best == torch.arange(200)).float().mean() > 0.9


@pytest.mark.parametrize("layers", [1, 3])
def test_a_query_knows_all_layers_before(layers: int) -> None:
    rng = drawing(6)
    model, behaviors = made(rng, layers=layers), drawn(rng)
    model(behaviors, None)[1].square().sum().backward()
    for former, layer in enumerate(model.layers):
        if former == 0:
            assert layer.compress is None
            continue
        moved = layer.compress.weight.grad.view(WIDTH, former + 1, WIDTH).abs().amax((0, 2)) > 0
        assert moved.all() and moved.numel() == former + 1
