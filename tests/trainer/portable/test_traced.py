"""Operators of exported models give the bits of those that they stand in for."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.models import GROUPS, MARK_ROWS, drawing, drawn_vectors, drawn_windows
from trainer.model.ops.signs import sign_bits
from trainer.model.ops.top import top_columns
from trainer.model.ops.traced import ranked_by_standard, traced_frexp, traced_top_columns
from trainer.model.retrieve.exact import PairScores
from trainer.model.retrieve.score import DotScorer, twin_projections
from trainer.model.time import AGE_BUCKETS, Form, TimeBias, TimeEncoding, age_bucket

exporting = patch("torch.compiler.is_exporting", lambda: True)
positive = st.floats(min_value=2.0**-990, max_value=2.0**900, allow_nan=False)


@settings(max_examples=50)
@given(st.lists(positive, min_size=1, max_size=20), st.integers(-900, 900))
def test_significands_and_exponents_are_those_of_frexp(numbers: list[float], power: int) -> None:
    near = [2.0**power, 2.0**power * (1 + 2.0**-52), 2.0**power * (1 - 2.0**-53)]
    number = torch.tensor([*numbers, *near], dtype=torch.float64)
    significand, exponent = torch.frexp(number)
    mine = traced_frexp(number)
    assert torch.equal(mine[0], significand)
    assert torch.equal(mine[1], exponent)


def test_age_buckets_are_the_same_around_every_border() -> None:
    borders = [int(2 ** (half / 2)) + off for half in range(124) for off in (-1, 0, 1)]
    seconds = torch.tensor([-5, 0, *(each for each in borders if each > 0)])
    plain = age_bucket(seconds)
    with exporting:
        assert torch.equal(age_bucket(seconds), plain)
    assert plain.max() == AGE_BUCKETS - 1


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(5, 12), st.booleans())
def test_top_columns_are_the_same_with_many_ties(seed: int, k: int, width: int, standard: bool) -> None:
    rng = drawing(seed)
    score = torch.randint(-2, 3, (7, width), generator=rng).double()
    score = score.masked_fill(torch.rand(7, width, generator=rng) < 0.4, -torch.inf)
    plain = top_columns(score.float(), k)
    if standard:
        # Torch promises no order of equal numbers, so this form is tried on numbers that are all different.
        score = score - torch.arange(width) * 1e-3
        plain = top_columns(score.float(), k)
        with ranked_by_standard():
            mine = traced_top_columns(score, k)
    else:
        mine = traced_top_columns(score, k)
    assert torch.equal(mine[0], plain[0])
    assert torch.equal(mine[1], plain[1])


def test_sign_bits_are_the_same() -> None:
    rng = drawing(1)
    vectors, planes = torch.randn(50, 8, generator=rng), torch.randn(8, 64, generator=rng)
    vectors[::5] = 0.0
    plain = sign_bits(vectors, planes)
    with exporting:
        assert torch.equal(sign_bits(vectors, planes), plain)


@pytest.mark.parametrize("form", ["shared", "target", "joint"])
@pytest.mark.parametrize("kind", ["plain", "bias", "encoding", "heads"])
def test_scores_of_whole_windows_are_the_exact_ones_of_pairs(kind: str, form: Form) -> None:
    """To the bit, as both are the same whole numbers' products."""
    rng, width = drawing(3), 6
    bias = TimeBias(MARK_ROWS, form, GROUPS, 4) if kind in ("bias", "heads") else None
    encoding = TimeEncoding(MARK_ROWS, width, form, GROUPS) if kind == "encoding" else None
    maps = twin_projections(width, 2, 4) if kind == "heads" else (None, None)
    scorer = DotScorer(*maps, 2 if kind == "heads" else 1, bias, encoding)
    for parameter in scorer.parameters():
        torch.nn.init.normal_(parameter, generator=rng)
    with torch.no_grad():
        windows = drawn_windows(rng, 4, 9, 10, sized=True)
        raw = drawn_vectors(rng, width, 10, cross=True)
        pairs = PairScores(scorer, raw, scorer.encode(raw), windows)
        whole = torch.stack(pairs.of_windows(), dim=1)
        candidate, head, column = torch.nonzero(whole > -torch.inf, as_tuple=True)
        assert torch.equal((whole > -torch.inf)[:, 0], windows.mask[windows.of_candidate])
        exact = pairs.of(candidate * scorer.heads + head, column)
        assert torch.equal(whole[candidate, head, column], exact)
