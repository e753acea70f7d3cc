"""LONGER against a whole list of tokens with a mask for each candidate, and what must not matter to it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.models import MARK_ROWS, draw, drawing, drawn_behaviors, drawn_windows
from tests.helpers.stretches import check_empty_history
from tests.trainer.model.read.test_stca import alone
from trainer.model.read import longer
from trainer.model.read.longer import Block, MergedTokens
from trainer.model.read.sequence import Behaviors
from trainer.model.time import TimeEncoding
from trainer.model.windows import Windows

WIDTH = 8
PLAIN = {"merge": 3, "recent": 2, "token_width": 0, "inner": True, "layers": 2, "heads": 2, "expansion": 2}


def made(rng: torch.Generator, **changed: Any) -> MergedTokens:
    config = SimpleNamespace(**{**PLAIN, "target_aware": True, **changed})
    model = MergedTokens(WIDTH, config, TimeEncoding(MARK_ROWS, WIDTH))
    draw(model, rng, 0.3)
    return model


def drawn(rng: torch.Generator, windows: int = 3, width: int = 11, candidates: int = 5) -> Behaviors:
    return drawn_behaviors(rng, drawn_windows(rng, windows, width, candidates), WIDTH, whole=True)


def block_reference(block: Block, asking: Tensor, known: Tensor, seen: Tensor) -> Tensor:
    """[Q, d], [Y, d], bool [Q, Y] -> [Q, d], one head at a time."""
    width = asking.shape[1]
    size = width // block.heads
    query, key, value = (
        block.query(block.norm(asking)),
        *(m(block.norm(known)) for m in (block.key, block.value)),
    )
    read = []
    for head in range(block.heads):
        part = slice(head * size, (head + 1) * size)
        score = query[:, part] @ key[:, part].T / size**0.5
        read.append(score.masked_fill(~seen, -torch.inf).softmax(1) @ value[:, part])
    asking = asking + block.out(torch.cat(read, dim=1))
    return asking + block.forward_network(block.norm_forward(asking))


def parts_reference(model: MergedTokens, behaviors: Behaviors, c: int) -> tuple[Tensor, Tensor]:
    """h and CLS of one candidate, by docs/specs/longer.md: all tokens in one list, the candidate first."""
    windows, w = behaviors.windows, int(behaviors.windows.of_candidate[c])
    vectors = []
    for x in range(int(windows.mask[w].sum())):
        entered = model.enter(behaviors.value_SD[behaviors.place[w, x]])
        for name in MARK_ROWS:
            entered = entered + model.time.tables[name][getattr(windows.marks, name)[w, x]]
        vectors.append(model.after(F.gelu(entered)))
    tokens = [model.target(behaviors.target_CD[c]), model.cls]
    for start in range(0, len(vectors), model.merge):
        group = torch.stack(vectors[start : start + model.merge])
        if model.inner is not None:
            every = torch.ones(len(group), len(group), dtype=torch.bool)
            group = block_reference(model.inner, group, group, every)
        merged = F.pad(group, (0, 0, 0, model.merge - len(group))).flatten()
        tokens.append(merged if model.narrow is None else model.narrow(merged))
    known = torch.stack(tokens)
    for block in model.blocks:
        asking = known[: 2 + model.recent]
        seen = torch.arange(len(known))[None, :] >= torch.arange(len(asking))[:, None]
        known = block_reference(block, asking, known, seen)
    return model.leave_target(model.norm(known[0])), model.leave_cls(model.norm(known[1]))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    windows=st.integers(1, 4),
    width=st.integers(1, 12),
    candidates=st.integers(0, 5),
    merge=st.integers(1, 4),
    recent=st.integers(1, 4),
    layers=st.integers(1, 3),
    narrow=st.sampled_from([0, 6]),
    inner=st.booleans(),
)
@torch.no_grad()
def test_parts_follow_the_equations(
    seed: int,
    windows: int,
    width: int,
    candidates: int,
    merge: int,
    recent: int,
    layers: int,
    narrow: int,
    inner: bool,
) -> None:
    """Empty windows, windows of nobody and incomplete groups among them."""
    rng = drawing(seed)
    model = made(rng, merge=merge, recent=recent, layers=layers, token_width=narrow, inner=inner)
    behaviors = drawn(rng, windows, width, candidates)
    target, pooled, product, cls = model(behaviors, None)
    assert torch.equal(target, behaviors.target_CD) and torch.equal(product, target * pooled)
    for c in range(candidates):
        wanted, wanted_cls = parts_reference(model, behaviors, c)
        assert torch.allclose(pooled[c], wanted, rtol=1e-4, atol=1e-4)
        assert torch.allclose(cls[c], wanted_cls, rtol=1e-4, atol=1e-4)
    assert model.output_width == 4 * WIDTH


@pytest.mark.parametrize("changed", [{}, {"inner": False}, {"token_width": 64}])
@torch.no_grad()
def test_a_token_with_the_candidates_own_item_is_seen_at_first(changed: dict[str, Any]) -> None:
    """Of 125 tokens of four small vectors each. With torch's own first maps and biases it had 1 / 110,
    as any other."""
    width, keys = 48, {**PLAIN, "merge": 4, "heads": 4, "layers": 3, **changed}
    torch.manual_seed(0)
    model = MergedTokens(width, SimpleNamespace(**keys, target_aware=True), TimeEncoding({}, width))
    value_SD, first = torch.randn(500, width) * 0.25, model.blocks[0]
    rng = drawing(0)
    drawn = drawn_behaviors(rng, drawn_windows(rng, 1, 500, 1), width, whole=True)
    windows = replace(drawn.windows, mask=torch.ones(1, 500, dtype=torch.bool))
    behaviors = replace(drawn, windows=windows, value_SD=value_SD, place=torch.arange(500)[None])
    assert isinstance(first, Block)
    token_WYd, _ = model.tokens(behaviors)
    query, (key, _) = first.asked(model.target(value_SD)[None]), first.remembered(token_WYd)
    weight = (query @ key.transpose(2, 3) * key.shape[3] ** -0.5).softmax(3)[0]
    own = weight[:, torch.arange(500), torch.arange(500) // 4]
    assert own.mean() > 0.1


def states(model: MergedTokens, behaviors: Behaviors) -> list[Tensor]:
    """What every layer remembers of its window: keys, [W, heads, Y, *] each; CLS is the first."""
    seen: list[Tensor] = []

    def kept(block: Block, token: Tensor) -> tuple[Tensor, Tensor]:
        key, value = compute(block, token)
        seen.append(key)
        return key, value

    compute = Block.remembered
    with patch.object(longer.Block, "remembered", kept), torch.no_grad():
        model(behaviors, None)
    # Of the neighbors within groups first; then two of each layer, the second of the candidates' own.
    return seen[1::2]


def test_the_history_is_the_same_to_the_bit_whoever_the_candidates_are() -> None:
    rng = drawing(1)
    model, behaviors = made(rng, layers=3), drawn(rng)
    others = replace(behaviors, target_CD=behaviors.target_CD * -2 + 1)
    before, after = states(model, behaviors), states(model, others)
    assert [part.shape[2] for part in before] == [5, 3, 3]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert torch.equal(model(behaviors, None)[3], model(others, None)[3])
    assert not torch.allclose(model(behaviors, None)[1], model(others, None)[1])


def test_no_state_knows_anything_newer() -> None:
    """A behavior moves its own group, what is newer, and CLS; groups are counted from the newest."""
    rng = drawing(2)
    model = made(rng, layers=3, recent=4)
    full = drawn_windows(rng, 1, 11, 1, full=True)
    behaviors = drawn_behaviors(rng, full, WIDTH, whole=True)
    before = states(model, behaviors)
    for x in range(11):
        value_SD = behaviors.value_SD.clone()
        value_SD[behaviors.place[0, x]] += 1
        after = states(model, replace(behaviors, value_SD=value_SD))
        group = 1 + x // model.merge
        for layer, (some, other) in enumerate(zip(before, after, strict=True)):
            moved = (some != other).any(3).any(1)[0]
            place = torch.arange(len(moved))
            wanted = place == group if layer == 0 else place <= group
            assert torch.equal(moved, wanted), (x, layer)


@torch.no_grad()
def test_a_candidate_depends_on_itself_and_its_window_alone() -> None:
    rng = drawing(3)
    model, behaviors = made(rng), drawn(rng)
    together = model(behaviors, None)
    for c in range(5):
        for more in (0, 4):
            apart = model(alone(behaviors, c, more), None)
            assert all(
                torch.allclose(some[0], other[c], atol=1e-5)
                for some, other in zip(apart, together, strict=True)
            )


@torch.no_grad()
def test_groups_follow_the_newest_behavior() -> None:
    """One more behavior, newer than all, cuts all groups anew; one more that is older does not."""
    rng = drawing(4)
    model = made(rng, layers=1, recent=1, inner=False)
    full = drawn_windows(rng, 1, 7, 1, full=True)
    behaviors = drawn_behaviors(rng, full, WIDTH, whole=True)

    def tokens(windows: Windows) -> Tensor:
        return model.tokens(replace(behaviors, windows=windows, place=windows.index))[0][0]

    def columns(part: slice) -> Windows:
        marks = full.marks.each(lambda mark: mark[:, part])
        return replace(full, index=full.index[:, part], mask=full.mask[:, part], marks=marks)

    whole = tokens(full)
    assert torch.allclose(tokens(columns(slice(0, 6))), whole[:2], atol=1e-6)
    assert not torch.allclose(tokens(columns(slice(1, 7))), whole[:2], atol=1e-2)


def test_an_empty_history_gives_numbers_and_gradients() -> None:
    rng = drawing(5)
    model, behaviors = made(rng), drawn(rng)
    check_empty_history(model, behaviors)
