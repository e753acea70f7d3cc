"""VISTA: the summary knows no candidate, and candidates know the history by the summary alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from embeddings.errors import ConfigError
from tests.helpers.launching import ROOT
from tests.helpers.models import batch_of, draw, drawing, model_of, preset, small_log, with_ids
from tests.helpers.stretches import Array, alone, mapped, normed, numbers, padded, silu, stretch_behaviors
from trainer.model.read.sequence import Behaviors
from trainer.model.read.vista import QuasiLinearLayer, SummaryAttention, Vista
from trainer.model.time import AGE_BUCKETS, TimeEncoding
from trainer.run_config import load_config

WIDTH, LONGEST, SEEDS, HEADS, DIM = 6, 9, 3, 2, 4
ROWS = {"position": LONGEST + 4, "age": AGE_BUCKETS}
LENGTHS, ASKED = [5, 0, 3, 9], [0, 0, 1, 2, 3, 3, 3]


def made(seed: int, layers: int = 2, seeds: int = SEEDS) -> Vista:
    model = Vista(WIDTH, layers, HEADS, DIM, seeds, LONGEST, TimeEncoding(ROWS, WIDTH))
    draw(model, drawing(seed))
    return model


def heads_of(x: Array) -> list[Array]:
    return np.split(x, HEADS)


def summarised(layer: QuasiLinearLayer, tokens: list[Array]) -> list[Array]:
    """The next states of some tokens, the sums written out."""
    inputs = [normed(x, layer.norm) for x in tokens]
    keys = [heads_of(silu(mapped(x, layer.key))) for x in inputs]
    values = [heads_of(mapped(x, layer.value)) for x in inputs]
    found = []
    for x, y in zip(tokens, inputs, strict=True):
        parts = []
        for head, query in enumerate(heads_of(silu(mapped(y, layer.query)))):
            memory = np.zeros((DIM, DIM))
            for key, value in zip(keys, values, strict=True):
                memory += np.outer(key[head], value[head]) / LONGEST
            parts.append(query @ silu(memory))
        state = x + mapped(normed(np.concatenate(parts), layer.norm_pooled), layer.out)
        gated = normed(state, layer.norm_gated)
        found.append(state + mapped(mapped(gated, layer.gate) * mapped(gated, layer.up), layer.down))
    return found


def attended(block: SummaryAttention, x: Array, tokens: list[Array]) -> Array:
    """What one candidate makes of a summary."""
    inputs, parts = [normed(s, block.norm_tokens) for s in tokens], []
    for head, query in enumerate(heads_of(mapped(normed(x, block.norm), block.query))):
        scores = np.array([query @ heads_of(mapped(s, block.key))[head] for s in inputs]) / DIM**0.5
        weights = np.exp(scores - scores.max())
        values = np.array([heads_of(mapped(s, block.value))[head] for s in inputs])
        parts.append(weights / weights.sum() @ values)
    x = x + mapped(np.concatenate(parts), block.out)
    first, _, last = block.hidden
    hidden = torch.nn.functional.gelu(torch.from_numpy(mapped(normed(x, block.norm_hidden), first)))
    return x + mapped(numbers(hidden), last)


def reference(model: Vista, behaviors: Behaviors) -> Array:
    """Candidate by candidate, each with a summary of its own."""
    windows, found = behaviors.windows, []
    for c, window in enumerate(windows.of_candidate.tolist()):
        tokens = []
        for j in range(int(windows.mask[window].sum())):
            time = [
                numbers(model.time.tables[name][int(getattr(windows.marks, name)[window, j])])
                for name in ROWS
            ]
            tokens.append(numbers(behaviors.value_SD[behaviors.place[window, j]]) + sum(time))
        tokens += list(numbers(model.seeds))
        for layer in model.layers:
            tokens = summarised(layer, tokens)
        found.append(attended(model.attention, numbers(behaviors.target_CD[c]), tokens[-len(model.seeds) :]))
    return np.array(found).reshape(-1, WIDTH)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    asked=st.lists(st.integers(0, 2), max_size=4),
    layers=st.integers(1, 3),
    seeds=st.integers(1, 3),
)
def test_states_equal_sums_over_one_token_at_a_time(
    seed: int, lengths: list[int], asked: list[int], layers: int, seeds: int
) -> None:
    """With empty windows and windows of nobody."""
    of_candidate = sorted(window % len(lengths) for window in asked)
    behaviors = stretch_behaviors(drawing(seed), lengths, of_candidate, WIDTH)
    model = made(seed, layers, seeds)
    target, state, product = model(behaviors, None)
    assert torch.equal(target, behaviors.target_CD) and torch.equal(product, target * state)
    assert np.allclose(numbers(state), reference(model, behaviors), atol=1e-4, rtol=1e-3)


def test_a_candidate_is_scored_alone_as_in_company_and_with_any_padding() -> None:
    behaviors, model = stretch_behaviors(drawing(1), LENGTHS, ASKED, WIDTH), made(1)
    together = model(behaviors, None)[1]
    apart = torch.cat([model(alone(behaviors, c), None)[1] for c in range(len(ASKED))])
    assert torch.isfinite(together).all() and together.std() > 0.1
    assert torch.allclose(together, apart, atol=1e-4)
    assert torch.allclose(together, model(padded(behaviors, 3), None)[1], atol=1e-4)
    other = replace(behaviors, target_CD=behaviors.target_CD.clone())
    other.target_CD[5] += torch.arange(WIDTH)
    moved = (model(other, None)[1] != together).any(1)
    assert moved.tolist() == [c == 5 for c in range(len(ASKED))]


def test_what_lies_under_the_mask_is_never_read() -> None:
    """Bit for bit, the gradient too."""
    behaviors, model = stretch_behaviors(drawing(2), LENGTHS, ASKED, WIDTH), made(2)
    place = torch.where(behaviors.windows.mask, behaviors.place, behaviors.value_SD.shape[0] - 5)
    marks = behaviors.selection.marks.each(lambda part: torch.where(behaviors.windows.mask, part, 3))
    littered = replace(behaviors, place=place, selection=replace(behaviors.selection, marks=marks))
    assert torch.equal(model(behaviors, None)[1], model(littered, None)[1])


def test_the_summary_is_the_same_whoever_the_candidates_are(tmp_path: Path) -> None:
    """Bit for bit; it is all that candidates know of the history, and each layer's tokens know all of it."""
    config = preset("vista", small_log(tmp_path / "log"))
    model, batch = model_of(config).eval(), batch_of(config)
    sequence, seen, read = model.branches["main"].sequence, [], []
    compute, attend = sequence.summary, sequence.attend
    sequence.summary = lambda *given_: seen.append(compute(*given_)) or seen[-1]
    sequence.attend = lambda *given_: read.append(attend(*given_)) or read[-1]
    rows = {"item_id": 60, "category_id": 9}
    candidate = torch.arange(batch.features.stride()) >= batch.behaviors

    def other(key: str, ids: Tensor) -> Tensor:
        return (ids + 1) % rows[key]

    with torch.no_grad():
        model(batch)
        model(with_ids(batch, lambda key, ids: torch.where(candidate, other(key, ids), ids)))
        model(with_ids(batch, lambda key, ids: torch.where(candidate, ids, other(key, ids))))
        users, same, others = seen
        assert users.shape == (batch.requests, 32, sequence.width)
        assert torch.equal(users, same) and not torch.equal(read[0], read[1])
        empty = batch.window_end == batch.window_start
        changed = (users != others).any(2).any(1)
        assert torch.equal(changed, ~empty) and changed.any()
        # With the summary of the first batch, the third one's candidates are those of the first.
        sequence.summary = lambda *_: users
        model(with_ids(batch, lambda key, ids: torch.where(candidate, ids, other(key, ids))))
    assert torch.equal(read[3], read[0]) and not torch.equal(read[2], read[0])


def test_the_cost_is_linear_in_the_window() -> None:
    model, costs = made(3), []
    for length in (100, 200, 400):
        behaviors = stretch_behaviors(drawing(3), [length], [0], WIDTH)
        marks = behaviors.selection.marks.each(lambda part: part.clamp(max=5))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(replace(behaviors, selection=replace(behaviors.selection, marks=marks)), None)
        costs.append(counter.get_total_flops())
    assert costs[2] - costs[1] == 2 * (costs[1] - costs[0]) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (['data.search.levels=["category_id"]', "data.recent=50"], 'sequence = "vista" reads stretches'),
        (['model.time_target="target"', 'model.time_group="category_id"'], 'takes time_target = "shared"'),
    ],
)
def test_windows_of_a_candidates_own_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(ROOT / "configs/vista.toml", words)
