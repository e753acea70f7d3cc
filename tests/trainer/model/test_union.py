"""What is looked up second: with other behaviors that fill it up, and without, the model is the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.logs import Shape, random_rows, write_log
from tests.helpers.models import batch_of, drawing, drawn_windows, model_of, preset
from tests.trainer.test_presets import preset_log
from trainer.data.batch import RequestBatch, Sizes
from trainer.model.frame import TwoStageModel
from trainer.model.union import most_kept, padded_union, touched_by, union_of
from trainer.objectives.bce import loss_sum

BEHAVIORS = 30


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    windows=st.integers(1, 4),
    candidates=st.integers(0, 6),
    k=st.integers(1, 5),
)
def test_a_padded_union_holds_what_was_kept_and_then_others(
    seed: int, windows: int, candidates: int, k: int
) -> None:
    rng = drawing(seed)
    drawn = drawn_windows(rng, windows, 8, candidates)
    column = torch.rand(candidates, 8, generator=rng).argsort(1)[:, :k]
    mask = drawn.mask[drawn.of_candidate].gather(1, column)
    kept = [drawn.columns(column, mask), drawn]
    behavior_S, place_N = union_of(kept, BEHAVIORS)
    seen = {int(n) for each in kept for n in each.index[each.mask]}
    assert behavior_S.tolist() == sorted(seen)
    assert torch.equal(touched_by(kept, BEHAVIORS).nonzero()[:, 0], behavior_S)
    for bound in range(len(seen), BEHAVIORS + 2):
        padded = padded_union(kept, BEHAVIORS, bound)
        if bound >= BEHAVIORS:
            assert padded is None
            continue
        assert padded is not None
        assert padded[0].unique().numel() == padded[0].numel() == bound
        assert torch.equal(padded[0][: len(seen)], behavior_S)
        assert torch.equal(padded[1], place_N)


def test_the_bound_counts_each_request_once_and_windows_without_candidates() -> None:
    sizes = Sizes(windows=(10, 4, 7), starts=(0, 10, 14), candidates=(2, 3, 0), bags=(), one_id=True)
    assert most_kept(sizes, [(0, 3)]) == 6 + 4
    assert most_kept(sizes, [(0, None)]) == 10 + 4 + 7
    assert most_kept(sizes, [(5, None)]) == 5 + 4 + 5
    assert most_kept(sizes, [(0, 3), (0, 2)]) == 10 + 4
    assert most_kept(sizes, [(0, 1), (2, None)]) == 4 + 4 + 2
    # Of a user's overlapping windows, no more than they cover.
    assert most_kept(replace(sizes, starts=(0, 7, 11)), [(0, None)]) == 18
    assert most_kept(replace(sizes, starts=(0, 7, 18)), [(0, None)]) == 11 + 7
    assert most_kept(Sizes((), (), (), (), one_id=True), [(0, 3)]) == 0


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9), st.integers(0, 3)), max_size=8),
    branches=st.lists(st.tuples(st.integers(0, 5), st.none() | st.integers(1, 4)), min_size=1, max_size=3),
    seed=st.integers(0, 10_000),
)
def test_nothing_keeps_more_than_the_bound(
    requests: list[tuple[int, int, int]], branches: list[tuple[int, int | None]], seed: int
) -> None:
    """Whatever the candidates keep, in whatever order windows lie."""
    rng = np.random.default_rng(seed)
    kept: set[int] = set()
    for start, window, candidates in requests:
        for newest, k in branches:
            seen = range(start + window - min(window, newest or window), start + window)
            for _ in range(1 if k is None else candidates):
                kept |= set(rng.permutation(seen)[:k].tolist())
    starts, windows, candidates = (tuple(request[part] for request in requests) for part in range(3))
    sizes = Sizes(windows, starts, candidates, (), one_id=True)
    assert len(kept) <= most_kept(sizes, branches) == most_kept_reference(sizes, branches)


def most_kept_reference(sizes: Sizes, branches: list[tuple[int, int | None]]) -> int:
    """One request after the other."""
    total = kept = begin = end = 0
    for start, window, candidates in zip(sizes.starts, sizes.windows, sizes.candidates, strict=True):
        if start >= end:
            total, kept, begin = total + min(kept, end - begin), 0, start
        begin, end = min(begin, start), max(end, start + window)
        seen = [(min(window, newest or window), k) for newest, k in branches]
        mine = sum(most if k is None else min(most, candidates * k) for most, k in seen)
        kept += min(window, mine)
    return total + min(kept, end - begin)


# Of each kind one that looks up twice: one branch, several groups, several branches, searches while reading.
MODELS = {
    "dare": ["model.k=1"],
    "twin_4e": ["model.k=2"],
    "dsi_tin": ["model.k=1", "model.branches.content.k=2"],
    "dare_search": ["model.k=1"],
    "best": ["model.k=1", "model.branches.recent.k=2", "data.recent=2"],
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preset_log(tmp_path_factory.mktemp("union") / "log")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_pads_its_second_lookup_is_the_same(name: str, log: Path) -> None:
    """Logits to the bit; gradients but for the order in which rows of the same id are added up."""
    config = preset(name, log, "data.history_length=40", "data.requests_per_block=1", *MODELS[name])
    model, batch = model_of(config), batch_of(config)
    model.branches.pads = False
    logits, gradients, strides = passed(model, batch)
    model.branches.pads = True
    same, others, padded = passed(model, batch)
    assert torch.equal(logits, same)
    assert padded[: len(model.first)] == strides[: len(model.first)]
    late = len(model.late)
    assert min(strides[-late:]) < min(padded[-late:]) < batch.behaviors + batch.candidates
    for weight, gradient in gradients.items():
        assert (gradient is None) == (others[weight] is None), weight
        if gradient is not None:
            assert torch.allclose(gradient, others[weight], atol=1e-6), weight


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000), length=st.integers(1, 40), block=st.integers(1, 4), k=st.integers(1, 9))
def test_a_padded_model_is_the_same_on_any_log(
    tmp_path_factory: pytest.TempPathFactory, seed: int, length: int, block: int, k: int
) -> None:
    log = write_log(tmp_path_factory.mktemp("any") / "log", {"train": random_rows(seed, Shape(users=5))})
    sizes = [f"data.history_length={length}", f"data.requests_per_block={block}", f"model.k={k}"]
    config = preset("dare", log, *sizes)
    model, batch = model_of(config), batch_of(config)
    found = []
    for model.branches.pads in (False, True):
        found.append(passed(model, batch))
    (logits, gradients, _), (same, others, _) = found
    assert torch.equal(logits, same)
    for weight, gradient in gradients.items():
        other = others[weight]
        assert gradient is not None and other is not None
        assert torch.allclose(gradient, other, atol=1e-6), weight


@pytest.mark.parametrize("behaviors", [0, 20])
def test_a_model_whose_bound_is_no_less_than_all_looks_up_all(behaviors: int, tmp_path: Path) -> None:
    rows = random_rows(3, Shape(users=2, behaviors=max(behaviors, 1), candidates=9))
    if not behaviors:
        for row in rows:
            row |= {"history_timestamp": [], "num_behaviors": 0, "history_item_id": []}
            row |= {"history_category_id": [], "request_history_end": [0] * row["num_requests"]}
    config = preset("dare", write_log(tmp_path / "log", {"train": rows}))
    model, batch = model_of(config), batch_of(config)
    assert bool(batch.behaviors) == bool(behaviors)
    model.branches.pads = True
    _, _, (first, second) = found = passed(model, batch)
    model.branches.pads = False
    assert torch.equal(found[0], passed(model, batch)[0])
    assert first == second == batch.behaviors + batch.candidates


def passed(model: TwoStageModel, batch: RequestBatch) -> tuple[Tensor, dict[str, Tensor | None], list[int]]:
    """Logits, gradients, and the strides of all look-ups."""
    strides: list[int] = []
    hooks = [
        collection.register_forward_pre_hook(lambda _, given: strides.append(given[0].stride()))
        for collection in model.collections.values()
    ]
    model.zero_grad()
    logits = model(batch).logits
    loss_sum(logits, batch.labels, batch.weight).backward()
    for hook in hooks:
        hook.remove()
    return logits, {name: weight.grad for name, weight in model.named_parameters()}, strides
