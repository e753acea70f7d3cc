"""The K best of a row, and stage one over slices, against slow references; ties are many."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.model_references import search_reference
from tests.helpers.models import GROUPS, MARK_ROWS, draw, drawing
from trainer.model.ops import top
from trainer.model.ops.top import (
    best_of_groups,
    top_columns,
    top_columns_by_keys,
    top_columns_by_topk,
    top_of_groups,
)
from trainer.model.retrieve import slices, window_search_cpu
from trainer.model.retrieve.dot import DotSearch
from trainer.model.retrieve.score import AttentionVectors, DotScorer
from trainer.model.retrieve.search import Query
from trainer.model.time import Marks, TimeBias
from trainer.model.windows import Windows


def slow(row: list[float], k: int) -> list[int]:
    real = [x for x, value in enumerate(row) if value != -torch.inf]
    best = sorted(real, key=lambda x: (-torch.inf if row[x] != row[x] else -row[x], x))
    return sorted(best[:k])


def drawn_scores(seed: int, rows: int, width: int, levels: int, empty: float) -> Tensor:
    """Few different values, and -inf; the last row is all alike, unless all is to be empty."""
    rng = drawing(seed)
    score = torch.randint(-levels, levels + 1, (rows, width), generator=rng).float()
    score[torch.rand(rows, width, generator=rng) < empty] = -torch.inf
    score[-1:] = 1.0 if empty < 1 else -torch.inf
    return score


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 5),
    width=st.one_of(st.integers(1, 30), st.integers(150, 700)),
    k=st.integers(1, 12),
    levels=st.sampled_from([1, 5, 10_000]),
    empty=st.sampled_from([0.0, 0.3, 0.99, 1.0]),
    last=st.booleans(),
    groups=st.integers(1, 200),
)
def test_top_columns_are_those_of_a_slow_sort(
    seed: int, rows: int, width: int, k: int, levels: int, empty: float, last: bool, groups: int
) -> None:
    """Groups of one column and of more, fewer of them than K, K beyond the width, few or none that count."""
    score = drawn_scores(seed, rows, width, levels, empty)
    best = torch.stack([score[:, g::groups].amax(1) for g in range(min(groups, width))], dim=1)
    assert torch.equal(best_of_groups(score, groups), best)
    given = score.flip(1) if last else score
    ways = [
        top_columns(given, k, last=last),
        top_of_groups(given.contiguous(), best, k, last=last),
        top_columns_by_topk(score, k),
        top_columns_by_keys(given, k, last=last),
    ]
    for column, mask in ways:
        assert column.shape == mask.shape == (rows, min(k, width))
        for c, row in enumerate(score.tolist()):
            wanted = slow(row, k)
            assert column[c][mask[c]].tolist() == wanted
            assert mask[c].tolist() == [j < len(wanted) for j in range(min(k, width))]
            assert (column[c][~mask[c]] == width - 1).all()


SPECIAL = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 1.0, 1.0000001, -1.0)


@settings(max_examples=150, deadline=None)
@given(
    score=st.integers(1, 9).flatmap(
        lambda width: st.lists(
            st.lists(st.sampled_from(SPECIAL), min_size=width, max_size=width), min_size=1, max_size=3
        )
    ),
    k=st.integers(1, 6),
    last=st.booleans(),
    keys=st.sampled_from([1, 1 << 28]),
)
def test_all_forms_rank_what_is_hardly_a_number_alike(
    score: list[list[float]], k: int, last: bool, keys: int
) -> None:
    """NaN is as good as infinity, the two zeros are one, the least numbers are none of them."""
    rows = torch.tensor(score)
    given = rows.flip(1) if last else rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top, "_KEYS", keys)
        ways = [
            top_columns_by_keys(given, k, last=last),
            top_columns(given, k, last=last),
            top_columns_by_topk(rows, k),
        ]
    for column, mask in ways:
        for c, row in enumerate(score):
            assert column[c][mask[c]].tolist() == slow(row, k)
        assert (column[~mask] == rows.shape[1] - 1).all()


@pytest.mark.parametrize("width", [12, 600])
def test_nan_is_kept_so_that_the_loss_shows_it(width: int) -> None:
    score = torch.randn(3, width, generator=drawing(1))
    score[0, 7], score[1, 2:9] = torch.nan, torch.nan
    column, mask = top_columns(score, 4)
    assert mask.all() and 7 in column[0].tolist() and column[1].tolist() == [2, 3, 4, 5]
    assert column[2].tolist() == slow(score[2].tolist(), 4)


@pytest.mark.parametrize(("rows", "width"), [(0, 5), (0, 900)])
def test_nobody_ranks_anything(rows: int, width: int) -> None:
    column, mask = top_columns(torch.zeros(rows, width), 3)
    assert column.shape == mask.shape == (0, 3)


def drawn_slices(rng: torch.Generator, windows: int, longest: int, candidates: int) -> tuple[Windows, int]:
    """Windows that are stretches of one history; empty ones among them."""
    behaviors = longest + 5
    length = torch.randint(0, longest + 1, (windows,), generator=rng)
    end = length + (torch.rand(windows, generator=rng) * (behaviors - length + 1)).long()
    step = torch.arange(max(int(length.max()), 1))
    mask = step < length[:, None]
    marks = [torch.randint(1, rows, mask.shape, generator=rng) * mask for rows in MARK_ROWS.values()]
    of_candidate = torch.randint(0, windows, (candidates,), generator=rng).sort().values
    index = torch.where(mask, end[:, None] - 1 - step, 0)
    return Windows(index, mask, Marks(*marks), None, of_candidate, length), behaviors


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    windows=st.integers(1, 4),
    longest=st.one_of(st.integers(1, 12), st.integers(200, 400)),
    candidates=st.integers(1, 9),
    k=st.integers(1, 14),
    cells=st.sampled_from([1, 500, 1 << 20]),
    biased=st.booleans(),
    cross=st.booleans(),
)
def test_slices_keep_what_a_slow_search_keeps(
    seed: int, windows: int, longest: int, candidates: int, k: int, cells: int, biased: bool, cross: bool
) -> None:
    """Small whole numbers: scores are exact, and many are equal."""
    rng = drawing(seed)
    made, behaviors = drawn_slices(rng, windows, longest, candidates)
    scorer = DotScorer(None, None, 1, TimeBias(MARK_ROWS) if biased else None, None)
    draw(scorer, rng)
    for parameter in scorer.parameters():
        parameter.data.mul_(4).round_()
    whole = (torch.randint(-2, 3, (n, 4), generator=rng).float() for n in (candidates, behaviors))
    of_cross = torch.randint(-1, 2, (behaviors,), generator=rng).float() if cross else None
    raw = AttentionVectors(*whole, torch.zeros(candidates, dtype=torch.int64), of_cross)
    query = Query(scorer, scorer.encode(raw), raw, made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "_LEAST", 0)
        patch.setattr(slices, "_CELLS", cells)
        patch.setattr(slices, "_WIDE", 4)
        patch.setattr(slices, "_MANY", 4 * longest // 2)
        patch.setattr(window_search_cpu, "_LEAST", 0)
        patch.setattr(window_search_cpu, "_FEWEST", 0)
        assert slices.pays(scorer, query.vectors, made)
        by_kernel = DotSearch(k)(query)
        patch.setattr(window_search_cpu, "kernel", lambda: None)
        assert not window_search_cpu.pays(scorer, query.vectors, made)
        sliced = DotSearch(k)(query)
    gathered = DotSearch(k)(replace(query, windows=replace(made, lengths=None)))
    with torch.no_grad():
        wanted = search_reference(query, k)
    for kept in (by_kernel, sliced, gathered):
        assert torch.equal(kept.mask, wanted.mask) and torch.equal(kept.index, wanted.index)
        assert torch.equal(kept.marks.age, wanted.marks.age)
        assert (kept.index[~kept.mask] == 0).all()


def test_slices_are_only_for_what_they_can_do() -> None:
    """Long stretches of the history, one head, and nothing that differs between a window's candidates."""
    rng = drawing(3)
    made, behaviors = drawn_slices(rng, 8, 9_000, 3)
    raw = AttentionVectors(torch.randn(3, 8), torch.randn(behaviors, 8), torch.zeros(3, dtype=torch.int64))
    plain = DotScorer(None, None, 1, None, None)
    assert slices.pays(plain, raw, made)
    assert not slices.pays(plain, raw, replace(made, lengths=None))
    assert not slices.pays(DotScorer(None, None, 2, None, None), raw, made)
    target = TimeBias(MARK_ROWS, "target", GROUPS)
    assert not slices.pays(DotScorer(None, None, 1, target, None), raw, made)
    short = replace(made, index=made.index[:, :100], mask=made.mask[:, :100])
    assert not slices.pays(plain, raw, short)
