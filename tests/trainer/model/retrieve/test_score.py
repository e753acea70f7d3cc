"""Scores and weights: every form against one pair at a time, in both stages."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.helpers.models import (
    FORMS,
    GROUPS,
    MARK_ROWS,
    draw,
    drawing,
    drawn_behaviors,
    drawn_vectors,
    drawn_windows,
)
from trainer.model.ops import tiling
from trainer.model.read.target_attention import TargetAttention
from trainer.model.retrieve.score import (
    WEIGHTS,
    AttentionVectors,
    DotScorer,
    FeatureProjection,
    MlpScorer,
    Scorer,
    softmax_weights,
)
from trainer.model.time import TimeBias, TimeEncoding
from trainer.model.windows import Selection

PARTS = (4, 2)
WIDTH = sum(PARTS)
# kind of score, heads, how marks enter, form of the time tables
CASES = [
    ("dot", 1, "", "shared"),
    ("dot", 4, "", "shared"),
    ("mlp", 1, "", "shared"),
    *((kind, heads, "bias", form) for kind, heads in (("dot", 1), ("dot", 4), ("mlp", 1)) for form in FORMS),
    *(("dot", 1, "encoding", form) for form in FORMS),
    ("feature", 1, "bias", "shared"),
]


def scorer_of(kind: str, heads: int, time: str, form: str, rng: torch.Generator) -> Scorer:
    bias = TimeBias(MARK_ROWS, form, GROUPS, 3) if time == "bias" else None  # type: ignore[arg-type]
    encoding = TimeEncoding(MARK_ROWS, WIDTH, form, GROUPS) if time == "encoding" else None  # type: ignore[arg-type]
    query = key = None
    if kind == "feature":
        query, key = FeatureProjection(PARTS), FeatureProjection(PARTS)
    elif heads > 1:
        query, key = (nn.Linear(WIDTH, 3 * heads, bias=False) for _ in range(2))
    made = MlpScorer(WIDTH, 7, bias) if kind == "mlp" else DotScorer(query, key, heads, bias, encoding)
    draw(made, rng)
    return made


def places(kept: Selection, c: int, k: int) -> dict[str, int]:
    return {name: int(getattr(kept.marks, name)[c, k]) for name in MARK_ROWS}


def plain_bias(bias: TimeBias, group: int, at: dict[str, int]) -> Tensor:
    if bias.form == "target":
        return sum(bias.targets[group] @ bias.curves[n][m] / bias.dim**0.5 for n, m in at.items())
    first = group if bias.form == "joint" else 0
    return sum(bias.tables[n][first * MARK_ROWS[n] + m] for n, m in at.items())


def plain_encodings(encoding: TimeEncoding, group: int, at: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Of the target and of a behavior."""
    first = {n: (group if encoding.form == "joint" else 0) * rows for n, rows in MARK_ROWS.items()}
    of_target = sum(encoding.tables[n][first[n]] for n in at)
    if encoding.targets is not None:
        of_target = encoding.targets[group]
    return of_target, sum(encoding.tables[n][first[n] + m] for n, m in at.items())


def plain_score(scorer: Scorer, vectors: AttentionVectors, kept: Selection, c: int, k: int) -> Tensor:
    """Scores [H] of one pair by the textbook."""
    query, key = vectors.query_CD[c], vectors.key_ND[kept.index[c, k]]
    group, at = int(vectors.group_C[c]), places(kept, c, k)
    if isinstance(scorer, MlpScorer):
        together = torch.cat([query, key, query - key, query * key])
        score = scorer.last(scorer.slope(scorer.first(together)[None]))[0] / WIDTH
    else:
        assert isinstance(scorer, DotScorer)
        if scorer.encoding is not None:
            of_target, of_behavior = plain_encodings(scorer.encoding, group, at)
            query, key = query + of_target, key + of_behavior
        if scorer.query is not None and scorer.key is not None:
            query, key = scorer.query(query[None])[0], scorer.key(key[None])[0]
        query, key = (v.view(scorer.heads, -1) for v in (query, key))
        score = (query * key).sum(1) / query.shape[1] ** 0.5
    if scorer.bias is not None:
        score = score + plain_bias(scorer.bias, group, at)
    if vectors.cross_N is not None:
        score = score + vectors.cross_N[kept.index[c, k]]
    return score if kept.log_size is None else score + kept.log_size[c, k]


@settings(max_examples=80, deadline=None)
@given(
    case=st.sampled_from(CASES),
    seed=st.integers(0, 10_000),
    windows=st.integers(1, 3),
    width=st.integers(1, 5),
    candidates=st.integers(0, 4),
    cross=st.booleans(),
    sized=st.booleans(),
)
def test_both_stages_score_a_pair_alike(
    case: tuple[str, int, str, str],
    seed: int,
    windows: int,
    width: int,
    candidates: int,
    cross: bool,
    sized: bool,
) -> None:
    """`over_windows` equals `of_kept` equals one pair at a time, for every form that settings allow."""
    rng = drawing(seed)
    scorer, raw = scorer_of(*case, rng), drawn_vectors(rng, WIDTH, candidates, cross=cross)
    made = drawn_windows(rng, windows, width, candidates, sized=sized)
    kept, vectors = made.of_candidates(), scorer.encode(raw)
    with torch.no_grad():
        over, of_kept = scorer.over_windows(vectors, made), scorer.of_kept(vectors, kept)
        assert over.shape == of_kept.shape == (candidates, scorer.heads, width)
        assert (over[~kept.mask[:, None].expand_as(over)] == -torch.inf).all()
        for c, k in kept.mask.nonzero().tolist():
            plain = plain_score(scorer, raw, kept, c, k)
            assert torch.allclose(over[c, :, k], plain, atol=1e-5)
            assert torch.allclose(of_kept[c, :, k], plain, atol=1e-5)


def test_din_first_layer_in_parts_equals_the_concatenated_form() -> None:
    """Values and gradients of DIN's attention, whose layer of width 4D is never built."""
    rng = drawing(0)
    scorer, raw = MlpScorer(WIDTH, 7, None), drawn_vectors(rng, WIDTH, 6)
    draw(scorer, rng)
    kept = drawn_windows(rng, 6, 5, 6, full=True).of_candidates()
    query, key = raw.query_CD[:, None].expand(-1, 5, -1), raw.key_ND[kept.index]
    together = torch.cat([query, key, query - key, query * key], dim=2)
    plain = scorer.last(scorer.slope(scorer.first(together).flatten(0, 1))).view(6, 5) / WIDTH
    found = []
    for scored in (scorer.of_kept(raw, kept)[:, 0], plain):
        scored.square().sum().backward(retain_graph=True)
        found.append([scored, *(p.grad for p in scorer.parameters())])
        scorer.zero_grad(set_to_none=True)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*found, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    windows=st.integers(1, 6),
    width=st.integers(1, 4),
    candidates=st.integers(0, 9),
    cells=st.sampled_from([1, 100, 300, 1 << 19]),
)
def test_din_by_groups_of_windows_equals_one_candidate_at_a_time(
    seed: int, windows: int, width: int, candidates: int, cells: int
) -> None:
    """Values and all gradients, however the windows are cut into groups."""
    rng = drawing(seed)
    scorer, drawn = MlpScorer(WIDTH, 7, TimeBias(MARK_ROWS)), drawn_vectors(rng, WIDTH, candidates)
    draw(scorer, rng)
    made = drawn_windows(rng, windows, width, candidates)
    kept, found = made.of_candidates(), []
    with mock.patch.object(tiling, "CPU", replace(tiling.CPU, cells=cells)):
        for grouped in (True, False):
            leaves = [part.clone().requires_grad_() for part in (drawn.query_CD, drawn.key_ND)]
            raw = replace(drawn, query_CD=leaves[0], key_ND=leaves[1])
            scores = scorer.over_windows(raw, made) if grouped else scorer.of_kept(raw, kept)
            scores = scores.masked_fill(~kept.mask[:, None], 0.0)
            scorer.zero_grad()
            scores.square().sum().backward()
            found.append([scores, *(part.grad for part in (*leaves, *scorer.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(0, 40), max_size=30), st.sampled_from([1, 50_000, 200_000]))
def test_groups_are_small_and_not_half_empty(counts: list[int], cells: int) -> None:
    for some in (tiling.CPU, replace(tiling.CPU, spare=500_000), tiling.DEVICE):
        groups = some.groups(counts, cells)
        windows = [window for each in groups for window in range(each.start, each.stop)]
        assert windows == list(range(len(counts)))
        for each in groups:
            inside, length = counts[each], each.stop - each.start
            room = length * max(*inside, 1, 1)
            empty = room - max(sum(inside), 1)
            assert length == 1 or room * cells <= some.cells
            assert length == 1 or empty <= max(sum(inside), 1) or empty * cells <= some.spare


@pytest.mark.parametrize(("weights", "factor"), [("softmax", 1.0), ("sigmoid", 2.0)])
def test_doing_everything_twice_doubles_only_pointwise_pools(weights: str, factor: float) -> None:
    """Sigmoid weights count how often, softmax weights share one unit."""
    rng = drawing(1)
    once = drawn_windows(rng, 4, 5, 6)
    sequence = TargetAttention(WIDTH, TimeEncoding(MARK_ROWS, WIDTH))
    scorer = DotScorer(None, None, 1, TimeBias(MARK_ROWS), None)
    draw(sequence, rng), draw(scorer, rng)
    columns = torch.arange(5).repeat_interleave(2).expand(6, -1)
    behaviors, pools = drawn_behaviors(rng, once, WIDTH, WIDTH), []
    for kept in (
        once.of_candidates(),
        once.columns(columns, once.mask[once.of_candidate].gather(1, columns)),
    ):
        score = scorer.of_kept(scorer.encode(behaviors.raw), kept)
        weight = WEIGHTS[weights](score, kept.mask[:, None])
        pools.append(sequence(replace(behaviors, selection=kept, place=kept.index), weight)[1])
    empty = ~once.mask.any(1)[once.of_candidate]
    assert empty.any() and not empty.all() and (pools[1][empty] == 0).all()
    assert pools[0].abs().sum(1)[~empty].min() > 0.1
    assert torch.allclose(pools[1], factor * pools[0], atol=1e-5)


def test_softmax_weights_add_up_to_one_where_anything_was_kept() -> None:
    score, mask = (
        torch.randn(4, 2, 3, generator=drawing(2)) * 50,
        torch.tensor([[1, 1, 0], [0, 0, 0]] * 2).bool(),
    )
    total = softmax_weights(score, mask[:, None]).sum(2)
    assert torch.allclose(total, mask.any(1).float()[:, None].expand(4, 2))


@pytest.mark.parametrize("case", CASES)
def test_nobody_is_scored(case: tuple[str, int, str, str]) -> None:
    rng = drawing(3)
    scorer, windows = scorer_of(*case, rng), drawn_windows(rng, 2, 3, 0)
    vectors = scorer.encode(drawn_vectors(rng, WIDTH, 0))
    shape = (0, scorer.heads, 3)
    assert scorer.over_windows(vectors, windows).shape == shape
    assert scorer.of_kept(vectors, windows.of_candidates()).shape == shape
