"""The numbers that a device's forms compute: against the CPU's own, on a GPU where there is one.

Without one the same forms run on the CPU, which shows that they are right but not that CUDA's operators are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers.models import BEHAVIORS, GROUPS, MARK_ROWS, draw, drawing, drawn_vectors, drawn_windows
from tests.trainer.model.ops.test_top import drawn_scores
from tests.trainer.model.test_device_forms import WIDTH, K, scorers, searches
from trainer.model.ops import bags, tiling
from trainer.model.ops.signs import random_planes, sign_bits, whole_sign_bits
from trainer.model.ops.top import top_columns, top_columns_by_keys
from trainer.model.retrieve.score import AttentionVectors, MlpScorer
from trainer.model.retrieve.search import Query, Search
from trainer.model.time import TimeBias, age_bucket
from trainer.model.windows import Selection, Windows

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the forms of a device run; on the CPU they are chosen there too."""
    if request.param == "cpu":
        monkeypatch.setattr(bags, "_by_cpu", lambda rows, index: False)
        monkeypatch.setattr(tiling, "CPU", tiling.DEVICE)
    return torch.device(request.param)


@pytest.mark.parametrize(("width", "k"), [(1, 3), (40, 20), (3000, 20), (70_000, 100)])
@pytest.mark.parametrize("levels", [1, 5, 10_000])
def test_the_best_columns(device: torch.device, width: int, k: int, levels: int) -> None:
    score = drawn_scores(width, 3, width, levels, 0.3)
    score[0, : width // 4] = -0.0
    score[1, width // 2 :: 7] = torch.nan
    for last in (False, True):
        wanted = top_columns(score, k, last=last)
        found = top_columns_by_keys(score.to(device), k, last=last)
        assert all(torch.equal(mine.cpu(), other) for mine, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("width", [1, 24, 96])
def test_signs(device: torch.device, width: int) -> None:
    """Of vectors that lie in a plane up to rounding, too."""
    rng, planes = drawing(1), random_planes(width, 64, seed=2)
    vector_ND = torch.randn(2000, width, generator=rng).double()
    plane_ND = planes.T[torch.arange(1000) % 64].double()
    along_N = (vector_ND[:1000] * plane_ND).sum(1) / plane_ND.square().sum(1)
    vector_ND[:1000] -= along_N[:, None] * plane_ND
    vector_ND[7] = 0.0
    found = whole_sign_bits(vector_ND.float().to(device), planes.to(device))
    assert torch.equal(found.cpu(), sign_bits(vector_ND.float(), planes))


def test_ages(device: torch.device) -> None:
    near = torch.tensor([int(2 ** (half / 2)) + step for half in range(90) for step in (-1, 0, 1)])
    assert torch.equal(age_bucket(near.to(device)).cpu(), age_bucket(near))


def values_and_gradients(
    function: Callable[..., Tensor], leaves: list[Tensor], place: torch.device, autocast: bool = False
) -> list[Tensor]:
    there = [leaf.detach().to(place).requires_grad_() for leaf in leaves]
    with torch.autocast(place.type, torch.bfloat16, enabled=autocast):
        found = function(*there)
    weight = torch.randn(found.shape, generator=drawing(9)).to(place)
    torch.where(found == -torch.inf, 0.0, found * weight).sum().backward()
    return [found.detach().cpu(), *(leaf.grad.cpu() for leaf in there if leaf.grad is not None)]


def close(
    function: Callable[..., Tensor], leaves: list[Tensor], device: torch.device, autocast: bool = False
) -> None:
    found = values_and_gradients(function, leaves, device, autocast)
    wanted = values_and_gradients(function, [leaf.double() for leaf in leaves], torch.device("cpu"))
    assert len(found) == len(wanted) == 1 + len(leaves)
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
def test_sums_and_products_of_kept_rows(device: torch.device, autocast: bool) -> None:
    """Half of the places are row 0, as padding is."""
    rng = drawing(3)
    index = torch.randint(0, 500, (300, 20), generator=rng) * (torch.rand(300, 20, generator=rng) < 0.5)
    query, rows, weight = (torch.randn(*shape, generator=rng) for shape in ((300, 32), (500, 32), (300, 20)))
    table = torch.randn(500, generator=rng)

    def at(place: torch.device) -> Tensor:
        return index.to(place)

    close(lambda q, r: bags.dots(q, r, at(q.device)), [query, rows], device, autocast)
    close(lambda r, w: bags.weighted_bags(r, at(r.device), w), [rows, weight], device, autocast)
    close(lambda t: bags.rows_at(t, at(t.device)), [table], device, autocast)


def test_din_in_one_tile(device: torch.device) -> None:
    rng = drawing(4)
    scorer = MlpScorer(WIDTH, 7, TimeBias(MARK_ROWS))
    draw(scorer, rng)
    windows, raw = drawn_windows(rng, 30, 20, 150), drawn_vectors(rng, WIDTH, 150)

    def score(query: Tensor, key: Tensor) -> Tensor:
        vectors = replace(on(raw, query.device), query_CD=query, key_ND=key)
        made = scorer.to(query.device, query.dtype)
        return made.over_windows(vectors, on_windows(windows, query.device))

    close(score, [raw.query_CD, raw.key_ND], device)


def on(raw: AttentionVectors, device: torch.device) -> AttentionVectors:
    return AttentionVectors(**{name: part.to(device) for name, part in vars(raw).items() if part is not None})


def on_windows(windows: Windows, device: torch.device) -> Windows:
    return Windows(
        windows.index.to(device),
        windows.mask.to(device),
        windows.marks.each(lambda part: part.to(device)),
        None,
        windows.of_candidate.to(device),
        counts=windows.host_counts,
    )


CASES = [("dot", "dot"), ("dot", "target"), ("hard", "dot"), ("simhash", "dot"), ("soft", "dot")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_search_in_training_keeps_what_the_cpu_keeps(
    device: torch.device, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of small whole numbers, whose scores are exact in any order of adding up; many are equal."""
    rng = drawing(5)
    scorer, search = scorers()[kind], searches()[name]
    for module in (draw(scorer, rng), draw(search, rng)):
        for parameter in module.parameters():
            parameter.data.mul_(4).round_()
    windows = drawn_windows(rng, 6, 24, 40)
    raw = AttentionVectors(
        torch.randint(-2, 3, (40, WIDTH), generator=rng).float() * WIDTH**0.5,
        torch.randint(-2, 3, (BEHAVIORS, WIDTH), generator=rng).float(),
        torch.randint(0, GROUPS, (40,), generator=rng),
    )
    ids_C, ids_N = (torch.randint(0, 4, (n, 1), generator=rng) for n in (40, BEHAVIORS))
    wanted = found_by(search, Query(scorer, scorer.encode(raw), raw, windows, ids_C, ids_N))
    if device.type == "cpu":
        monkeypatch.setattr(Search, "doubt", lambda search, query: None)
        monkeypatch.setattr(
            "trainer.model.retrieve.search.top_columns", lambda score, k, doubt: keys_of(score, k)
        )
        monkeypatch.setattr("trainer.model.retrieve.simhash.sign_bits", whole_sign_bits)
    raw, scorer = on(raw, device), scorer.to(device)
    ids_C, ids_N = ids_C.to(device), ids_N.to(device)
    query = Query(scorer, scorer.encode(raw), raw, on_windows(windows, device), ids_C, ids_N)
    found = found_by(search.to(device), query)
    assert torch.equal(found.mask.cpu(), wanted.mask) and torch.equal(found.index.cpu(), wanted.index)


def keys_of(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return top_columns_by_keys(score, k)


def found_by(search: Search, query: Query) -> Selection:
    with torch.no_grad():
        found: Selection = search.train()(query)
    assert found.index.shape == (40, K)
    return found
