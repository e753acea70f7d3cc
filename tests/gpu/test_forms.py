"""Operators on a GPU against their CPU forms, over drawn shapes and values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.gpu.inputs import move_tensors
from benchmarks.gpu.measure import difference
from benchmarks.inputs.windows import full_windows
from tests.helpers.models import drawing, drawn_vectors, drawn_windows
from trainer.model.ops import bags, top
from trainer.model.retrieve.dot import DotSearch
from trainer.model.retrieve.score import DotScorer
from trainer.model.retrieve.search import Query

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
SHAPES = st.tuples(*(st.integers(1, size) for size in (300, 40, 12, 33)))
SEEDS = st.integers(0, 2**20)


def both(run: object, given: list[Tensor], seed: int) -> list[tuple[Tensor, Tensor]]:
    """Value and gradients by the CPU and by the GPU."""
    sides = []
    for device in (torch.device("cpu"), CUDA):
        leaves = [part.to(device).requires_grad_() for part in given]
        out = run(*leaves)  # type: ignore[operator]
        out.backward(torch.randn(out.shape, generator=drawing(seed)).to(device))
        sides.append([out, *(leaf.grad for leaf in leaves)])
    return list(zip(*sides, strict=True))


@settings(max_examples=40, deadline=None)
@given(SHAPES, SEEDS)
def test_sums_and_products_of_rows(shape: tuple[int, int, int, int], seed: int) -> None:
    rows, queries, kept, width = shape
    rng = drawing(seed)
    rows_ND, query_CD = torch.randn(rows, width, generator=rng), torch.randn(queries, width, generator=rng)
    index = torch.randint(0, rows, (queries, kept), generator=rng)
    weight_CK = torch.randn(queries, kept, generator=rng)
    cases = [
        (lambda r, w: bags.weighted_bags(r, index.to(r.device), w), [rows_ND, weight_CK]),
        (lambda q, r: bags.dots(q, r, index.to(r.device)), [query_CD, rows_ND]),
        (lambda r: bags.rows_at(r, index.to(r.device)), [rows_ND]),
        (lambda r: bags.rows_at(r, index.to(r.device)), [rows_ND[:, 0].contiguous()]),
    ]
    for run, parts in cases:
        for ours, theirs in both(run, parts, seed):
            assert difference(theirs, ours) < 1e-5


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 300), st.integers(1, 40), st.booleans(), SEEDS)
def test_the_top_k_with_ties_infinities_and_nan(rows: int, width: int, k: int, last: bool, seed: int) -> None:
    score = torch.randn(rows, width, generator=drawing(seed)).mul(4).round().div(4)
    score[torch.rand(score.shape, generator=drawing(seed + 1)) < 0.1] = -torch.inf
    score[0, width // 2] = torch.nan
    ours, theirs = (top.top_columns(score.to(device), k, last=last) for device in ("cpu", CUDA))
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(mine, its.cpu())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 200), st.integers(1, 20), st.booleans(), SEEDS)
def test_a_search_keeps_the_same_scores(windows: int, length: int, k: int, full: bool, seed: int) -> None:
    if full:
        there, raw = full_windows(windows, 3, length, 16)
    else:
        there = drawn_windows(drawing(seed), windows, length, 3 * windows)
        raw = drawn_vectors(drawing(seed + 1), 16, 3 * windows, behaviors=max(length, 24))
    scorer, found = DotScorer(None, None, 1, None, None), []
    for device in (torch.device("cpu"), CUDA):
        mine = move_tensors(raw, device)
        vectors = scorer.encode(mine)
        kept = DotSearch(k)(Query(scorer, vectors, mine, move_tensors(there, device)))
        assert kept.mask.sum(1).tolist() == there.mask.sum(1).clamp(max=k)[there.of_candidate].tolist()
        found.append(scorer.of_kept(vectors, kept)[:, 0].masked_fill(~kept.mask, 0).sort(dim=1).values)
    assert difference(found[1], found[0]) < 1e-5
