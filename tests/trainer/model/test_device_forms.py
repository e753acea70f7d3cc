"""What a device other than the CPU computes, checked without one.

A tensor on "meta" has a shape and no numbers: whatever asks it for one raises, which is how waits are found.
What the forms of a device compute is compared on the CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.models import (
    BEHAVIORS,
    FORMS,
    GROUPS,
    MARK_ROWS,
    batch_of,
    draw,
    drawing,
    drawn_vectors,
    drawn_windows,
    model_of,
    preset,
    small_log,
)
from tests.trainer.model.ops.test_top import drawn_slices
from trainer.model.ops import bags, tiling
from trainer.model.ops.bags import dots, rows_at, weighted_bags
from trainer.model.ops.signs import close_sign_bits, random_planes, sign_bits, whole_sign_bits
from trainer.model.ops.tiling import tiling_of
from trainer.model.retrieve import slices
from trainer.model.retrieve.all import AllSearch
from trainer.model.retrieve.dot import DotSearch, SoftSearch
from trainer.model.retrieve.hard import HardSearch
from trainer.model.retrieve.score import AttentionVectors, DotScorer, MlpScorer, Scorer, twin_projections
from trainer.model.retrieve.search import Query, Search
from trainer.model.retrieve.simhash import HammingSearch
from trainer.model.time import TimeBias, TimeEncoding
from trainer.model.windows import Windows, pooled_windows

META, WIDTH, K = torch.device("meta"), 6, 3


class Operators(TorchDispatchMode):
    """Counts what torch's dispatcher is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.called: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def scorers() -> dict[str, Scorer]:
    bias = TimeBias(MARK_ROWS)
    return {
        "dot": DotScorer(None, None, 1, bias, None),
        "projected": DotScorer(*twin_projections(WIDTH, 1, 4), 1, TimeBias(MARK_ROWS, "joint", GROUPS), None),
        "target": DotScorer(None, None, 1, TimeBias(MARK_ROWS, "target", GROUPS), None),
        "encoding": DotScorer(None, None, 1, None, TimeEncoding(MARK_ROWS, WIDTH, "target", GROUPS)),
        "heads": DotScorer(*twin_projections(WIDTH, 2, 4), 2, bias, None),
        "mlp": MlpScorer(WIDTH, 5, bias),
    }


def searches() -> dict[str, Search]:
    return {
        "dot": DotSearch(K),
        "all": AllSearch(K),
        "hard": HardSearch(K),
        "simhash": HammingSearch(K, WIDTH, 40, seed=1),
        "soft": SoftSearch(K, WIDTH, 4),
    }


CASES = [(search, scorer) for search in searches() for scorer in (scorers() if search == "dot" else ["dot"])]


def moved(windows: Windows, raw: AttentionVectors) -> tuple[Windows, AttentionVectors]:
    """To "meta"; how many candidates a window has stays on the host, as collate puts it there."""
    parts = {name: part.to(META) for name, part in vars(raw).items() if part is not None}
    size = None if windows.log_size is None else windows.log_size.to(META)
    there = Windows(
        windows.index.to(META),
        windows.mask.to(META),
        windows.marks.each(lambda part: part.to(META)),
        size,
        windows.of_candidate.to(META),
        counts=windows.host_counts,
    )
    return there, AttentionVectors(**parts)


def query_on_meta(scorer: Scorer, candidates: int = 7) -> Query:
    rng = drawing(1)
    windows, raw = moved(
        drawn_windows(rng, 3, 20, candidates, sized=True), drawn_vectors(rng, WIDTH, candidates, cross=True)
    )
    ids_C, ids_N = (torch.zeros(n, 2, dtype=torch.int64, device=META) for n in (candidates, BEHAVIORS))
    scorer = scorer.to(META)
    return Query(scorer, scorer.encode(raw), raw, windows, ids_C, ids_N)


@pytest.mark.parametrize(("search", "scorer"), CASES)
@pytest.mark.parametrize("candidates", [0, 7])
def test_a_search_in_training_asks_a_device_for_nothing(search: str, scorer: str, candidates: int) -> None:
    kept = searches()[search].to(META)(query_on_meta(scorers()[scorer], candidates))
    assert kept.index.device == META and kept.index.shape == (candidates, 20 if search == "all" else K)


@pytest.mark.parametrize("scorer", scorers())
def test_scores_and_their_gradients_ask_a_device_for_nothing(scorer: str) -> None:
    """Stage two too, of whole windows and of kept behaviors."""
    query = query_on_meta(scorers()[scorer])
    over = query.scorer.over_windows(query.vectors, query.windows)
    kept = query.windows.of_candidates()
    of_kept = query.scorer.of_kept(query.vectors, kept)
    assert over.shape == of_kept.shape == (7, query.scorer.heads, 20)
    pooled = [
        pooled_windows(query.raw.key_ND, query.windows.index, query.windows, over[:, 0]),
        weighted_bags(query.raw.key_ND, kept.index, of_kept[:, 0]),
    ]
    torch.cat(pooled).sum().backward()
    assert all(part.grad is not None for part in query.scorer.parameters())


@pytest.mark.parametrize("scorer", scorers())
@torch.no_grad()
def test_exact_scores_are_asked_for_in_evaluation_and_on_the_cpu(scorer: str) -> None:
    """So that a request is scored alike in any company."""
    search, query = DotSearch(K), query_on_meta(scorers()[scorer])
    assert search.doubt(query) is None
    with pytest.raises(RuntimeError, match="meta"):
        search.eval()(query)
    rng = drawing(1)
    raw, here = drawn_vectors(rng, WIDTH, 7), draw(scorers()[scorer], rng)
    assert isinstance(here, Scorer)
    query = Query(here, here.encode(raw), raw, drawn_windows(rng, 3, 20, 7))
    assert search.train().doubt(query) is not None and search.eval().doubt(query) is not None


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(0, 20),
    width=st.integers(1, 70),
    bits=st.integers(1, 40),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    products=st.sampled_from([1, 1 << 26]),
)
def test_signs_of_whole_numbers_are_the_bits_of_the_cpu(
    seed: int, rows: int, width: int, bits: int, scale: float, products: int
) -> None:
    """Of vectors in a plane too, as far as single precision allows, and of zeros."""
    rng, planes = drawing(seed), random_planes(width, bits, seed)
    vector_ND = torch.randn(rows, width, generator=rng).double()
    for n in range(0, rows, 2):
        plane = planes[:, n % bits].double()
        vector_ND[n] -= plane * (vector_ND[n] @ plane) / plane.square().sum()
    vector_ND[1::5] = 0.0
    vector_ND[3::5, 1:] = 0.0
    given = (vector_ND * scale).float()
    wanted = close_sign_bits(given, planes)
    with mock.patch("trainer.model.ops.signs._PRODUCTS", products):
        assert torch.equal(whole_sign_bits(given, planes), wanted)
    order = torch.randperm(rows, generator=rng)
    assert torch.equal(whole_sign_bits(given[order], planes), wanted[order])
    assert torch.equal(sign_bits(given, planes), wanted)


def test_signs_ask_a_device_for_nothing() -> None:
    vector_ND, planes = torch.zeros(9, WIDTH, device=META), torch.zeros(WIDTH, 5, device=META)
    assert sign_bits(vector_ND, planes).shape == (9, 5)


def din(seed: int, windows: int, candidates: int, tiled: tiling.Tiling) -> tuple[Counter[str], list[Tensor]]:
    """Operators of a forward and backward pass of DIN's attention; scores and all gradients."""
    rng = drawing(seed)
    scorer, drawn = MlpScorer(WIDTH, 7, TimeBias(MARK_ROWS)), drawn_vectors(rng, WIDTH, candidates)
    draw(scorer, rng)
    made = drawn_windows(rng, windows, 5, candidates)
    leaves = [part.clone().requires_grad_() for part in (drawn.query_CD, drawn.key_ND)]
    raw = replace(drawn, query_CD=leaves[0], key_ND=leaves[1])
    with mock.patch.object(tiling, "CPU", tiled), Operators() as counted:
        score = scorer.over_windows(raw, made)
        score.masked_fill(score == -torch.inf, 0.0).square().sum().backward()
    return counted.called, [score.detach(), *(part.grad for part in (*leaves, *scorer.parameters()))]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    windows=st.integers(1, 9),
    candidates=st.integers(1, 12),
    cells=st.sampled_from([1, 100, 400, 1 << 28]),
    spare=st.sampled_from([0, 70, 1 << 24]),
    always_again=st.booleans(),
)
def test_din_is_the_same_in_tiles_of_any_size(
    seed: int, windows: int, candidates: int, cells: int, spare: int, always_again: bool
) -> None:
    _, wanted = din(seed, windows, candidates, tiling.DEVICE)
    _, found = din(seed, windows, candidates, tiling.Tiling(cells, spare, always_again))
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_din_on_a_device_has_as_many_operators_whatever_the_batch() -> None:
    assert tiling_of(torch.device("cpu")) is tiling.CPU and tiling_of(META) is tiling.DEVICE
    few, many = (din(0, windows, 5 * windows, tiling.DEVICE)[0] for windows in (4, 60))
    assert few == many and 0 < many.total() < 200
    tiles = din(0, 60, 300, replace(tiling.CPU, cells=700))[0]
    assert tiles.total() > 10 * many.total()
    assert many["aten::baddbmm"] == 1, "nothing is computed again where one tile holds all"


@pytest.fixture(params=[False, True], ids=["cpu", "device"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bags by the CPU's forms, and by those of devices."""
    if request.param:
        monkeypatch.setattr(bags, "_by_cpu", lambda rows, index: False)


def halved() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def both(function: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        single = function()
        with halved():
            return single, function()


@pytest.mark.usefixtures("form")
def test_sums_and_scores_are_in_single_precision_under_autocast() -> None:
    """To the bit what they are without it, given the same vectors."""
    rng = drawing(2)
    windows, raw = drawn_windows(rng, 3, 20, 7, sized=True), drawn_vectors(rng, WIDTH, 7, cross=True)
    kept, weight_CK = windows.of_candidates(), torch.rand(7, 20, generator=rng)
    functions = [
        lambda: dots(raw.query_CD, raw.key_ND, kept.index),
        lambda: weighted_bags(raw.key_ND, kept.index, weight_CK),
        lambda: rows_at(raw.key_ND, kept.index),
        lambda: pooled_windows(raw.key_ND, windows.index, windows, weight_CK),
    ]
    for form in FORMS:
        encoding = TimeEncoding(MARK_ROWS, WIDTH, form, GROUPS)
        draw(encoding, rng)
        arguments = (raw.query_CD, weight_CK, kept.marks, raw.group_C)
        functions += [
            lambda encoding=encoding, given=arguments: encoding.pooled(*given),
            lambda encoding=encoding, given=arguments: encoding.pooled(*given, many=True),
        ]
    for name, scorer in scorers().items():
        draw(scorer, rng)
        if name != "mlp":
            vectors = scorer.encode(raw)
            functions += [
                lambda scorer=scorer, vectors=vectors: scorer.over_windows(vectors, windows),
                lambda scorer=scorer, vectors=vectors: scorer.of_kept(vectors, kept),
            ]
    for function in functions:
        single, other = both(function)
        assert other.dtype == torch.float32 and torch.equal(single, other)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("scorer", scorers())
def test_scores_are_float32_whatever_autocast_made_of_the_vectors(scorer: str) -> None:
    """Layers are halved: the projections and DIN's. Gradients of the factors are what the factors are."""
    rng = drawing(3)
    made = scorers()[scorer]
    draw(made, rng)
    windows, raw = drawn_windows(rng, 3, 20, 7, sized=True), drawn_vectors(rng, WIDTH, 7, cross=True)
    kept = windows.of_candidates()
    with halved():
        vectors = made.encode(raw)
        over, of_kept = made.over_windows(vectors, windows), made.of_kept(vectors, kept)
    assert over.dtype == of_kept.dtype == torch.float32
    seen = kept.mask[:, None].expand_as(over)
    torch.testing.assert_close(over[seen], of_kept[seen], rtol=0.02, atol=0.05)
    over[seen].sum().backward()
    assert all(part.grad.dtype == torch.float32 for part in made.parameters())


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("length", [300, 10_000])
def test_half_precision_keeps_what_single_precision_keeps(length: int, cross: bool) -> None:
    """Copies of a few vectors that half precision cannot tell apart; every search, in both forms."""
    rng = drawing(4)
    windows, behaviors = drawn_slices(rng, 2, length, 4)
    kind = torch.randint(0, 50, (behaviors,), generator=rng)
    of_cross = 1e-3 * torch.randn(50, generator=rng)[kind] if cross else None
    raw = AttentionVectors(
        torch.randn(4, WIDTH, generator=rng),
        1 + 1e-3 * torch.randn(50, WIDTH, generator=rng)[kind],
        torch.randint(0, GROUPS, (4,), generator=rng),
        of_cross,
    )
    ids_C, ids_N = torch.randint(0, 3, (4, 1), generator=rng), kind[:, None] % 3
    sliced = set()
    for name, kind_of in CASES:
        scorer, search = scorers()[kind_of], searches()[name]
        draw(scorer, rng), draw(search, rng)
        for seen in (windows, replace(windows, lengths=None)):
            found = []
            for enabled in (False, True):
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.no_grad():
                    query = Query(scorer, scorer.encode(raw), raw, seen, ids_C, ids_N)
                    found.append(search(query))
            sliced |= {slices.pays(scorer, scorer.encode(raw), seen)}
            assert torch.equal(found[0].index, found[1].index), (name, kind_of)
            assert torch.equal(found[0].mask, found[1].mask)
    assert sliced == ({False} if length < 5_000 else {False, True})


@pytest.mark.parametrize("name", ["dare", "twin", "sim_soft", "eta", "twin_hard", "din"])
def test_a_model_keeps_the_same_under_autocast(name: str, tmp_path: Path) -> None:
    """Its projections are halved for stage two alone."""
    config = preset(name, small_log(tmp_path / "log"))
    model, batch = model_of(config), batch_of(config)
    wanted = model.search(batch)
    with halved():
        found = model.search(batch)
        logits = model(batch).logits
    # The head multiplied in half precision, and what it gives is float32 again.
    assert logits.dtype == torch.float32 and torch.equal(logits, logits.bfloat16().float())
    assert not torch.equal(logits, model(batch).logits)
    assert wanted.keys() == found.keys()
    for branch, kept in wanted.items():
        assert torch.equal(kept.index, found[branch].index) and torch.equal(kept.mask, found[branch].mask)
