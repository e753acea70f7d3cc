"""SDIM: how much a behavior at an angle weighs, and the buckets that a server would keep."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.helpers.model_references import collision_reference
from tests.helpers.models import BEHAVIORS, drawing, drawn_behaviors, drawn_windows
from trainer.model.read.collision import HashCollision
from trainer.model.read.sequence import Behaviors
from trainer.model.retrieve.score import AttentionVectors
from trainer.model.windows import Selection, Windows

WIDTH, HASHED = 6, 5


@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize("degrees", [15, 45, 75, 90, 120])
def test_a_behavior_weighs_as_its_angle_says(degrees: int, bits: int) -> None:
    """(1 - angle / pi) ** bits within 0.02: the pool of one behavior is that share of it."""
    rng, angle, count = drawing(degrees), math.radians(degrees), 32
    model = HashCollision(WIDTH, 16, 512, bits, 7, target_aware=False)
    query = F.normalize(torch.randn(count, 16, generator=rng), dim=1)
    rest = torch.randn(count, 16, generator=rng)
    aside = F.normalize(rest - (rest * query).sum(1, keepdim=True) * query, dim=1)
    key = 3 * (math.cos(angle) * query + math.sin(angle) * aside)
    each = torch.arange(count)
    full = drawn_windows(rng, count, 1, count, full=True)
    windows = replace(full, index=each[:, None], of_candidate=each)
    value = 5 * F.normalize(torch.randn(count, WIDTH, generator=rng), dim=1)
    raw = AttentionVectors(query, key, torch.zeros(count).long())
    kept, target = windows.of_candidates(), torch.zeros(count, WIDTH)
    _, pooled = model(Behaviors(windows, raw, raw, kept, False, target, value, kept.index), None)
    weight = (pooled * value / 5).sum(1)
    assert torch.allclose(pooled, weight[:, None] * value / 5, atol=1e-5)
    assert float(weight.mean()) == pytest.approx((1 - angle / math.pi) ** bits, abs=0.02)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    windows=st.integers(1, 4),
    width=st.integers(1, 8),
    candidates=st.integers(0, 4),
    hashes=st.integers(1, 4),
    bits=st.integers(1, 5),
)
def test_bucket_sums_equal_gathering_what_collides(
    seed: int, windows: int, width: int, candidates: int, hashes: int, bits: int
) -> None:
    """With empty windows, windows of nobody, and places of their own in the looked-up rows."""
    rng = drawing(seed)
    model = HashCollision(WIDTH, HASHED, hashes, bits, seed, target_aware=True)
    behaviors = on_windows(rng, drawn_windows(rng, windows, width, candidates))
    target, pooled, product = model(behaviors, None)
    assert torch.allclose(pooled, collision_reference(model, behaviors), atol=1e-5)
    assert torch.equal(target, behaviors.target_CD) and torch.equal(product, target * pooled)
    empty = ~behaviors.windows.mask.any(1)[behaviors.windows.of_candidate]
    assert (pooled[empty] == 0).all()


def test_buckets_know_no_candidate() -> None:
    """What a server keeps for a user is the same whoever asks."""
    rng = drawing(1)
    model = HashCollision(WIDTH, HASHED, 4, 3, 1, target_aware=False)
    behaviors = on_windows(rng, drawn_windows(rng, 3, 8, 5))
    others = replace(behaviors.raw, query_CD=-behaviors.raw.query_CD)
    asked = replace(behaviors, target_CD=behaviors.target_CD + 1, raw=others)
    sums = model.bucket_sums(behaviors)
    assert sums.shape == (3, 4 * 2**3, WIDTH) and sums.abs().max() > 1
    assert torch.equal(model.bucket_sums(asked), sums)
    assert not torch.equal(model(asked, None)[1], model(behaviors, None)[1])


def on_windows(rng: torch.Generator, windows: Windows) -> Behaviors:
    """As a sequence model on windows is given them: no copies for the candidates."""
    behaviors = drawn_behaviors(rng, windows, WIDTH, HASHED)
    place = torch.randperm(BEHAVIORS, generator=rng)[windows.index]
    selection = Selection(windows.index, windows.mask, windows.marks)
    return replace(behaviors, place=place, selection=selection)
