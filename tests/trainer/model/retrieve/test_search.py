"""Searches against slow references: round-robin, hard, SimHash, and stage one against stage two."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.helpers.model_references import hamming, pack_bits
from tests.helpers.models import BEHAVIORS, MARK_ROWS, draw, drawing, drawn_vectors, drawn_windows
from trainer.model.ops.signs import random_planes, sign_bits
from trainer.model.retrieve.dot import DotSearch, SoftSearch
from trainer.model.retrieve.hard import HardSearch
from trainer.model.retrieve.score import AttentionVectors, DotScorer
from trainer.model.retrieve.search import Query, round_robin
from trainer.model.retrieve.simhash import HammingSearch
from trainer.model.time import TimeBias
from trainer.model.windows import Selection, Windows

PLAIN = DotScorer(None, None, 1, None, None)


def walk(score_HX: Tensor, k: int) -> list[int]:
    """The heads' ranked lists in turn, one place at a time, until K different columns are found."""
    lists = [
        sorted((x for x, value in enumerate(row) if value > -math.inf), key=lambda x, row=row: (-row[x], x))
        for row in score_HX.tolist()
    ]
    found: list[int] = []
    for place in range(score_HX.shape[1]):
        for ranked in lists:
            if place < len(ranked) and ranked[place] not in found and len(found) < k:
                found.append(ranked[place])
    return sorted(found)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), heads=st.integers(1, 4), width=st.integers(1, 7), k=st.integers(1, 9))
def test_round_robin_equals_a_walk_over_the_heads_lists(
    data: st.DataObject, heads: int, width: int, k: int
) -> None:
    values = st.sampled_from([-math.inf, -1.0, 0.0, 2.0])  # few values, many ties
    rows = st.lists(values, min_size=width, max_size=width)
    score = torch.tensor([data.draw(st.lists(rows, min_size=heads, max_size=heads)) for _ in range(2)])
    column, mask = round_robin(score, k)
    assert column.shape == mask.shape and int(column.min()) >= 0 and int(column.max()) < width
    for heads_scores, columns, counted in zip(score, column, mask, strict=True):
        assert columns[counted].tolist() == walk(heads_scores, k)


def test_columns_of_windows_lead_to_behaviors_and_marks() -> None:
    """One by one, of several windows with sizes of clusters; what does not count is zero."""
    rng = drawing(3)
    windows = drawn_windows(rng, 3, 20, 9, sized=True)
    width = windows.index.shape[1]
    column = torch.randint(0, width, (9, 5), generator=rng)
    mask = windows.mask[windows.of_candidate].gather(1, column) & (torch.rand(9, 5, generator=rng) < 0.8)
    kept = windows.columns(column, mask)
    assert windows.log_size is not None and kept.log_size is not None and 10 < int(mask.sum()) < 45
    pairs = [(kept.index, windows.index), (kept.log_size, windows.log_size)]
    pairs += [(getattr(kept.marks, name), getattr(windows.marks, name)) for name in MARK_ROWS]
    for found, whole in pairs:
        for c, window in enumerate(windows.of_candidate.tolist()):
            for k in range(5):
                expected = whole[window, column[c, k]] if mask[c, k] else 0
                assert found[c, k] == expected


@pytest.mark.parametrize("heads", [1, 4])
def test_nobody_keeps_anything(heads: int) -> None:
    windows, raw = drawn_windows(drawing(0), 2, 3, 0), drawn_vectors(drawing(1), 8, 0)
    kept = DotSearch(2)(Query(DotScorer(None, None, heads, None, None), raw, raw, windows))
    assert kept.index.shape == kept.mask.shape == (0, 2)


@pytest.mark.parametrize("heads", [1, 4])
def test_twin_t1_stage_one_keeps_the_best_hundred_of_stage_two(heads: int) -> None:
    """One score function with one set of parameters for both: 100 hits of 100."""
    rng = drawing(0)
    windows, raw = drawn_windows(rng, 3, 400, 8, full=True), drawn_vectors(rng, 12, 8, behaviors=400)
    query, key = (nn.Linear(12, 8 * heads, bias=False) for _ in range(2))
    scorer = DotScorer(query, key, heads, TimeBias(MARK_ROWS), None)
    draw(scorer, rng)
    with torch.no_grad():
        vectors, everything = scorer.encode(raw), windows.of_candidates()
        kept = DotSearch(100)(Query(scorer, vectors, raw, windows))
        stage_two = scorer.of_kept(vectors, everything)
    assert kept.mask.all() and kept.index.shape == (8, 100)
    for c in range(8):
        best = walk(stage_two[c], 100)
        hits = set(kept.index[c].tolist()) & set(everything.index[c, best].tolist())
        assert len(hits) == 100
    best_of_head = stage_two.topk(100, dim=2).indices.sort(dim=2).values
    if heads > 1:  # no head's own list is what all of them together keep
        for head in range(heads):
            assert not torch.equal(everything.index.gather(1, best_of_head[:, head]), kept.index)


def columns_by(kept: Selection, windows: Windows, cost_CX: Tensor, k: int) -> None:
    """Assert that `kept` holds each window's K lowest (cost, column), in the order of columns."""
    for c, w in enumerate(windows.of_candidate.tolist()):
        seen = windows.mask[w].nonzero().squeeze(1).tolist()
        best = sorted(sorted(seen, key=lambda x, c=c: (float(cost_CX[c, x]), x))[:k])
        assert kept.index[c][kept.mask[c]].tolist() == windows.index[w, best].tolist()
        assert kept.marks.age[c][kept.mask[c]].tolist() == windows.marks.age[w, best].tolist()
        assert (kept.index[c][~kept.mask[c]] == 0).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.integers(1, 12), k=st.integers(1, 14), ids=st.integers(1, 4))
def test_hard_search_equals_a_slow_one(seed: int, width: int, k: int, ids: int) -> None:
    """The newest of the candidate's own id first, then the newest others. Id 0, unknown, is nobody's own."""
    rng = drawing(seed)
    windows, raw = drawn_windows(rng, 3, width, 5), drawn_vectors(rng, 2, 5)
    of_candidate, of_behavior = (torch.randint(0, ids + 1, (n,), generator=rng) for n in (5, BEHAVIORS))
    kept = HardSearch(k)(Query(PLAIN, raw, raw, windows, of_candidate, of_behavior))
    found = of_behavior[windows.index][windows.of_candidate]
    other = (found != of_candidate[:, None]) | (found == 0)
    columns_by(kept, windows, other.float(), k)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), bits=st.integers(1, 100), rows=st.integers(0, 4))
def test_packed_codes_differ_in_as_many_bits_as_plain_ones(data: st.DataObject, bits: int, rows: int) -> None:
    code = st.lists(st.booleans(), min_size=bits, max_size=bits)
    some, other = (
        torch.tensor([data.draw(code) for _ in range(rows)], dtype=torch.bool).view(rows, bits)
        for _ in range(2)
    )
    packed = pack_bits(some)
    assert packed.shape == (rows, -(-bits // 32))
    count = (some[:, None] != other[None]).sum(2)
    assert torch.equal(hamming(packed[:, None], pack_bits(other)[None]), count)


def test_all_bits_of_full_words_count() -> None:
    ones, none = torch.ones(1, 96, dtype=torch.bool), torch.zeros(1, 96, dtype=torch.bool)
    assert hamming(pack_bits(ones), pack_bits(none)).tolist() == [96]


@pytest.mark.parametrize("degrees", [15, 45, 75, 90, 120, 165])
def test_eta_bits_differ_with_the_angle(degrees: int) -> None:
    """P(a bit differs) = angle / pi, within 2 %, whichever way the pair lies: along two axes or anyhow."""
    rng, angle = drawing(degrees), math.radians(degrees)
    planes = random_planes(16, 60_000, seed=1)
    anyhow = [torch.linalg.qr(torch.randn(16, 16, generator=rng))[0] for _ in range(5)]
    for basis in (torch.eye(16), *anyhow):
        some, aside = basis[:8], basis[8:]  # eight pairs
        other = math.cos(angle) * some + math.sin(angle) * aside
        differing = (sign_bits(some, planes) != sign_bits(5 * other, planes)).float().mean()
        assert float(differing) == pytest.approx(angle / math.pi, rel=0.02)


def test_eta_planes_are_those_of_the_seed() -> None:
    assert torch.equal(random_planes(16, 40, seed=1), random_planes(16, 40, seed=1))
    assert not torch.equal(random_planes(16, 40, seed=1), random_planes(16, 40, seed=2))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), bits=st.integers(1, 70), width=st.integers(1, 12), k=st.integers(1, 14))
def test_eta_keeps_what_differs_in_the_fewest_bits(seed: int, bits: int, width: int, k: int) -> None:
    """By packed codes as a server holds them: the greatest products of the codes as +1 and -1, ties to the
    newest."""
    rng = drawing(seed)
    windows, raw = drawn_windows(rng, 3, width, 5), drawn_vectors(rng, 6, 5)
    search = HammingSearch(k, 6, bits, seed)
    code_C, code_N = (sign_bits(vectors, search.planes) for vectors in (raw.query_CD, raw.key_ND))
    code_CX = code_N[windows.index][windows.of_candidate]
    distance = hamming(pack_bits(code_C)[:, None], pack_bits(code_N)[windows.index][windows.of_candidate])
    product = torch.einsum("cb,cxb->cx", code_C * 2 - 1, code_CX * 2 - 1)
    assert torch.equal(product, bits - 2 * distance)
    # vectors that the scorer encoded are not what is hashed
    encoded = AttentionVectors(-raw.query_CD, raw.key_ND, raw.group_C)
    columns_by(search(Query(PLAIN, encoded, raw, windows)), windows, distance, k)


def test_sim_soft_search_keeps_the_greatest_products_of_its_own_maps() -> None:
    rng = drawing(5)
    windows, raw = drawn_windows(rng, 3, 9, 5), drawn_vectors(rng, 6, 5)
    search = SoftSearch(3, 6, 4)
    draw(search, rng)
    assert search.index.query is not None and search.index.key is not None
    product = (raw.query_CD @ search.index.query.weight.T) @ (raw.key_ND @ search.index.key.weight.T).T
    cost = -product.detach()[torch.arange(5)[:, None], windows.index[windows.of_candidate]]
    columns_by(search(Query(PLAIN, raw, raw, windows)), windows, cost, 3)
