"""Reading all sets in one pass against one set after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.models import FORMS, GROUPS, MARK_ROWS, draw, drawing, drawn_behaviors, drawn_windows
from trainer.model.read.collision import HashCollision
from trainer.model.read.sequence import Behaviors, SequenceModel
from trainer.model.read.target_attention import TargetAttention
from trainer.model.time import TimeEncoding

ATTENTION, CANDIDATES, WINDOWS = 5, 9, 4
WIDTHS = st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=4)


def compare(models: Sequence[Any], behaviors: Behaviors, weight_CHK: Tensor | None) -> None:
    """Values, and gradients of vectors, weights and parameters."""
    widths = [model.width for model in models]
    parameters = [parameter for model in models for parameter in model.parameters()]
    leaves = [behaviors.target_CD, behaviors.value_SD, *([] if weight_CHK is None else [weight_CHK])]
    leaves = [leaf.requires_grad_() for leaf in leaves] + parameters
    found = []
    plain = SequenceModel.read_sets.__func__  # type: ignore[attr-defined]
    for way in (type(models[0]).read_sets, lambda *given: plain(type(models[0]), *given)):
        parts = way(models, widths, behaviors, weight_CHK)
        outer = drawing(8)
        loss = sum((part * torch.randn(part.shape, generator=outer)).sum() for own in parts for part in own)
        found.append((parts, torch.autograd.grad(loss, leaves)))
    (fast, gradients), (slow, expected) = found
    assert [[p.shape for p in own] for own in fast] == [[p.shape for p in own] for own in slow]
    for a, b in zip([p for own in fast for p in own], [p for own in slow for p in own], strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    for a, b in zip(gradients, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@given(
    seed=st.integers(0, 2**16),
    widths=WIDTHS,
    heads=st.integers(1, 2),
    form=st.sampled_from(FORMS),
    whole=st.booleans(),
    target_aware=st.booleans(),
    maps=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_target_attention(
    seed: int, widths: list[int], heads: int, form: Any, whole: bool, target_aware: bool, maps: bool
) -> None:
    rng = drawing(seed)
    models = [
        draw(
            TargetAttention(
                width,
                TimeEncoding(MARK_ROWS, width, form, GROUPS),
                target_aware,
                heads,
                [4] * (width // 4) if maps else (),
            ),
            rng,
        )
        for width in widths
    ]
    windows = drawn_windows(rng, WINDOWS, 6, CANDIDATES)
    behaviors = drawn_behaviors(rng, windows, sum(widths), whole=whole)
    weight_CHK = torch.rand(CANDIDATES, heads, 6, generator=rng) * behaviors.selection.mask[:, None]
    compare(models, behaviors, weight_CHK)


@given(seed=st.integers(0, 2**16), widths=WIDTHS, target_aware=st.booleans())
@settings(max_examples=20, deadline=None)
def test_collision(seed: int, widths: list[int], target_aware: bool) -> None:
    rng = drawing(seed)
    models = [HashCollision(width, ATTENTION, 3, 2, 7, target_aware=target_aware) for width in widths]
    windows = drawn_windows(rng, WINDOWS, 6, CANDIDATES)
    behaviors = drawn_behaviors(rng, windows, sum(widths), ATTENTION, whole=True)
    compare(models, behaviors, None)


def test_vectors_are_cut_by_set_in_order() -> None:
    rng = drawing(1)
    behaviors = drawn_behaviors(rng, drawn_windows(rng, WINDOWS, 6, CANDIDATES), 12)
    one, other = behaviors.by_set([8, 4])
    for part in ("target_CD", "value_SD"):
        assert torch.equal(
            torch.cat([getattr(one, part), getattr(other, part)], dim=1), getattr(behaviors, part)
        )
    assert other.target_CD.shape[1] == other.value_SD.shape[1] == 4
    with pytest.raises(RuntimeError, match="split"):
        behaviors.by_set([8, 8])
