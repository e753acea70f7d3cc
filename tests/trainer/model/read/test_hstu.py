"""HSTU: equal to one pair at a time; behaviors know no candidate, and candidates not each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.errors import ConfigError
from tests.helpers.launching import ROOT
from tests.helpers.models import batch_of, draw, drawing, model_of, preset, small_log, watch
from tests.helpers.stretches import Array, alone, mapped, normed, numbers, padded, silu, stretch_behaviors
from trainer.model.read import hstu
from trainer.model.read.hstu import Hstu, PointwiseLayer
from trainer.model.read.sequence import Behaviors
from trainer.model.time import age_bucket
from trainer.run_config import load_config

WIDTH, LONGEST = 6, 7


def made(seed: int, layers: int = 2, heads: int = 2) -> Hstu:
    model = Hstu(WIDTH, layers, heads, 3, LONGEST)
    draw(model, drawing(seed))
    return model


def bucket(seconds: float) -> int:
    return int(age_bucket(torch.tensor([seconds])))


def attended(layer: PointwiseLayer, x: Array, seen: list[tuple[Array, int, int]]) -> Array:
    """The next state of one token from the tokens that it sees: their states, places and buckets from it."""

    def four(state: Array) -> list[Array]:
        return np.split(silu(mapped(normed(state, layer.norm), layer.parts)), 4)

    gate, _, query, _ = four(x)
    pooled = np.zeros_like(gate)
    dim = len(gate) // layer.heads
    for state, place, age in seen:
        _, value, _, key = four(state)
        for head in range(layer.heads):
            part = slice(head * dim, (head + 1) * dim)
            score = query[part] @ key[part] + numbers(layer.position)[place] + numbers(layer.age)[age]
            pooled[part] += silu(np.array(score)) * value[part] / LONGEST
    return x + mapped(normed(pooled, layer.norm_pooled) * gate, layer.out)


def reference(model: Hstu, behaviors: Behaviors) -> Array:
    """The last state of each candidate, by loops over candidates, layers and pairs."""
    windows, found = behaviors.windows, []
    assert windows.seconds is not None
    for c, window in enumerate(windows.of_candidate.tolist()):
        length = int(windows.mask[window].sum())
        # Newest first; a token's time is what it lies before the request.
        tokens = [numbers(behaviors.value_SD[behaviors.place[window, j]]) for j in range(length)]
        seconds = [int(windows.seconds[window, j]) for j in range(length)]
        y = numbers(behaviors.target_CD[c])
        for layer in model.layers:
            seen = [(x, j + 1, bucket(seconds[j])) for j, x in enumerate(tokens)]
            y = attended(layer, y, [(y, 0, 0), *seen])
            tokens = [
                attended(
                    layer,
                    tokens[i],
                    [
                        (tokens[j], j - i, bucket(seconds[j] - seconds[i]) if j > i else 0)
                        for j in range(i, length)
                    ],
                )
                for i in range(length)
            ]
        found.append(y)
    return np.array(found).reshape(-1, WIDTH)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    asked=st.lists(st.integers(0, 2), max_size=4),
    layers=st.integers(1, 3),
    heads=st.integers(1, 2),
)
def test_states_equal_one_pair_at_a_time(
    seed: int, lengths: list[int], asked: list[int], layers: int, heads: int
) -> None:
    """With empty windows and windows of nobody."""
    of_candidate = sorted(window % len(lengths) for window in asked)
    behaviors = stretch_behaviors(drawing(seed), lengths, of_candidate, WIDTH)
    model = made(seed, layers, heads)
    target, state, product = model(behaviors, None)
    assert torch.equal(target, behaviors.target_CD) and torch.equal(product, target * state)
    assert np.allclose(numbers(state), reference(model, behaviors), atol=1e-4, rtol=1e-4)


LENGTHS, ASKED = [5, 0, 3, 7], [0, 0, 1, 2, 3, 3, 3]


def test_a_candidate_is_scored_alone_as_in_company_and_with_any_padding() -> None:
    behaviors, model = stretch_behaviors(drawing(1), LENGTHS, ASKED, WIDTH), made(1)
    together = model(behaviors, None)[1]
    apart = torch.cat([model(alone(behaviors, c), None)[1] for c in range(len(ASKED))])
    assert torch.isfinite(together).all() and together.std() > 0.1
    assert torch.allclose(together, apart, atol=1e-5)
    assert torch.allclose(together, model(padded(behaviors, 4), None)[1], atol=1e-5)
    other = replace(behaviors, target_CD=behaviors.target_CD.clone())
    other.target_CD[5] += 1
    moved = (model(other, None)[1] != together).any(1)
    assert moved.tolist() == [c == 5 for c in range(len(ASKED))]


def test_a_behavior_knows_nothing_newer_and_no_padding() -> None:
    """Bit for bit, in all that a candidate reads of it; a padding place is seen by itself alone."""
    behaviors, model = stretch_behaviors(drawing(2), LENGTHS, ASKED, WIDTH), made(2, layers=3)
    windows = behaviors.windows
    state = behaviors.value_SD[behaviors.place]

    def known(state: torch.Tensor, seconds: torch.Tensor) -> torch.Tensor:
        pairs = model.of_history(state, replace(windows, seconds=seconds))
        return torch.cat([part.transpose(1, 2).flatten(2) for pair in pairs for part in pair], dim=2).detach()

    assert windows.seconds is not None
    before = known(state, windows.seconds)
    place = torch.arange(state.shape[1])
    for j in range(state.shape[1]):
        changed, seconds = state.clone(), windows.seconds.clone()
        changed[:, j] += torch.arange(WIDTH)
        seeing = torch.where(windows.mask[:, j, None], place <= j, place == j)
        assert torch.equal((known(changed, windows.seconds) != before).any(2), seeing)
        seconds[:, j] += 10**6
        # One's own time is no distance: neither the oldest behavior's states nor padding change.
        moved = (known(state, seconds) != before).any(2)
        assert not moved[:, j + 1 :].any() and moved[3, : min(j + 1, 6)].all()


def test_weights_are_not_normalised() -> None:
    """Every behavior twice gives twice the sum before the norm."""
    layer, rng = made(3).layers[0], drawing(3)
    assert isinstance(layer, PointwiseLayer)
    query, key, value = (torch.randn(1, 2, n, 3, generator=rng) for n in (1, 4, 4))
    bias, seen = torch.zeros(1, 1, 4), torch.ones(1, 1, 4, dtype=torch.bool)
    once = layer.pooled(query, key, value, bias, seen)
    twice = layer.pooled(
        query, key.repeat(1, 1, 2, 1), value.repeat(1, 1, 2, 1), bias.repeat(1, 1, 2), seen.repeat(1, 1, 2)
    )
    assert torch.allclose(twice, 2 * once) and once.abs().max() > 1e-3


def test_windows_one_after_the_other_are_those_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients too, which the backward pass computes from states that it makes again."""
    behaviors, found = stretch_behaviors(drawing(4), LENGTHS, ASKED, WIDTH), []
    for pairs in (hstu._PAIRS, 1):
        monkeypatch.setattr(hstu, "_PAIRS", pairs)
        model = made(4)
        given_ = replace(behaviors, value_SD=behaviors.value_SD.clone().requires_grad_())
        state = model(given_, None)[1]
        state.square().sum().backward()
        found.append([state, given_.value_SD.grad, *(weight.grad for weight in model.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-5) and one.abs().max() > 0


def test_times_are_relative(tmp_path: Path) -> None:
    """Behaviors later by as much as the request: the same bits. Only the request: other candidates' states,
    and what candidates read of the behaviors stays."""
    config = preset("hstu", small_log(tmp_path / "log"))
    model, batch = model_of(config).eval(), batch_of(config)
    later = replace(batch, request_time=batch.request_time + 10**7)
    both = replace(later, behavior_time=batch.behavior_time + 10**7)
    sequence, seen = model.branches["main"].sequence, watch(model)
    compute, known = sequence.of_history, []
    sequence.of_history = lambda *given_: known.append(compute(*given_)) or known[-1]
    logits = []
    with torch.no_grad():
        for asked in (batch, both, later):
            logits.append(model(asked).logits)
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    there = seen["main"][0].windows.mask[:, None, :, None]
    for one, other in zip(known[0], known[2], strict=True):
        assert all(torch.equal(a * there, b * there) for a, b in zip(one, other, strict=True))


def test_gaps_and_pairs_beyond_memory_are_refused() -> None:
    words = ["model.search=dot", 'data.search.levels=["category_id"]', "model.k=5"]
    with pytest.raises(ConfigError, match=r'sequence = "hstu" reads stretches .* set search = "recent"'):
        load_config(ROOT / "configs/hstu.toml", words)
    config = load_config(ROOT / "configs/hstu.toml", ["model.search=dot"]).model
    assert not Hstu.memory_problem(config, "model", 100, 3, 10**6 * 2)
    problem = Hstu.memory_problem(config, "model", 10_000, 3, 10**9)
    assert problem.startswith('model.sequence = "hstu" compares all 10,000 behaviors') and "4.8 GB" in problem
