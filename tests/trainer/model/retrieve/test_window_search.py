"""Stage one in one pass over the keys: the kernel compiled, on a device, and where it is chosen."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from tests.helpers.compiling import compiled
from tests.helpers.model_references import search_reference
from tests.helpers.models import GROUPS, MARK_ROWS, draw, drawing
from tests.helpers.searched_windows import Searched, all_scores, check, drawn_long, searched
from trainer.model.ops.kernels import agrees, power_of_two
from trainer.model.retrieve import window_search
from trainer.model.retrieve.dot import DotSearch, SoftSearch
from trainer.model.retrieve.score import AttentionVectors, DotScorer
from trainer.model.retrieve.search import Query
from trainer.model.retrieve.window_search import Cut, fits, pays, plain_best_columns
from trainer.model.time import TimeBias

PLAIN = DotScorer(None, None, 1, None, None)


@settings(max_examples=40, deadline=None)
@given(searched())
def test_the_plain_form_keeps_what_a_slow_search_keeps(given_to: Searched) -> None:
    if given_to.key.isfinite().all():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.helpers.searched_windows.best_columns", plain_best_columns)
            check(given_to)


@pytest.mark.parametrize(
    ("dim", "width", "stretch", "capability"),
    [(16, 1000, True, 90), (128, 10_000, False, 80), (36, 200, True, 100)],
)
def test_the_kernels_compile_without_a_gpu(
    dim: int, width: int, stretch: bool, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code that copies keys 16 bytes at a time ahead of the products, in little shared memory."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from trainer.model.retrieve.window_search_triton import constants, merge_kernel, search_kernel

    cut, k = Cut.of(dim, width, 3), 20
    given_to = constants(cut, dim, k, stretch=stretch, biased=not stretch)
    search = compiled(search_kernel, given_to, cut.warps, capability)
    left = {"LEFT": power_of_two(cut.spans * k), "SLOTS": power_of_two(k)}
    merge = compiled(merge_kernel, left, 1, capability)
    assert all(len(made.asm["cubin"]) > 1000 for made in (search, merge))
    assert re.search(r"cp\.async\.cg\.shared\.global .*, 0x10", search.asm["ptx"])
    assert search.metadata.shared <= 24 << 10 and merge.metadata.shared <= 24 << 10


def test_work_is_cut_so_that_long_windows_fill_a_device() -> None:
    assert Cut.of(16, 10_000, 3) == Cut(16, 3, 1, 128, 8, 10, 2)
    assert Cut.of(128, 1_000, 5) == Cut(128, 3, 2, 16, 64, 1, 2)
    assert Cut.of(36, 1, 500) == Cut(64, 4, 125, 16, 16, 1, 1)
    for dim in range(4, 257, 4):
        for width in (1, 257, 1024, 99_999):
            cut = Cut.of(dim, width, 4)
            span = cut.columns * cut.steps
            assert cut.columns >= 1 and (cut.spans - 1) * span < width <= cut.spans * span


def test_only_what_the_kernel_can_do_is_given_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = drawn_long(True)
    assert fits(made.query, made.key, made.windows, 256)
    assert not fits(made.query, made.key, made.windows, 257)
    assert not fits(made.query.double(), made.key.double(), made.windows, 20)
    assert not fits(made.query.bfloat16(), made.key.bfloat16(), made.windows, 20)
    for dim in (0, 2, 34, 260):
        assert not fits(torch.ones(5, dim), torch.ones(9, dim), made.windows, 20)
    wide = replace(made.windows, index=torch.zeros(2, 1, dtype=torch.int64).expand(2, 100_000))
    assert fits(made.query, made.key, wide, 64) and not fits(made.query, made.key, wide, 256)
    vectors = AttentionVectors(made.query, made.key, torch.zeros(5, dtype=torch.int64))
    assert not pays(PLAIN, vectors, made.windows, 20)  # on a CPU
    monkeypatch.setattr(window_search, "has_kernel", lambda device: True)
    monkeypatch.setattr(window_search, "agrees", lambda *asked: True)
    assert pays(PLAIN, vectors, made.windows, 20)
    assert not pays(DotScorer(None, None, 2, None, None), vectors, made.windows, 20)
    target = TimeBias(MARK_ROWS, "target", GROUPS)
    assert not pays(DotScorer(None, None, 1, target, None), vectors, made.windows, 20)


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize("soft", [True, False])
def test_searches_use_it_where_it_pays(soft: bool, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ask the device for no number then: neither which scores are in doubt nor how many candidates."""
    made, rng = drawn_long(True, 8, 300), drawing(2)
    search = SoftSearch(7, 8, 8) if soft else DotSearch(7)
    scorer = search.index if isinstance(search, SoftSearch) else PLAIN
    draw(search, rng)
    raw = AttentionVectors(made.query, made.key, torch.zeros(5, dtype=torch.int64))
    windows = replace(made.windows, counts=(4, 1))
    query = Query(PLAIN, PLAIN.encode(raw), raw, windows)
    with torch.no_grad():
        wanted = search_reference(replace(query, scorer=scorer, vectors=scorer.encode(raw)), 7)
    given_to: list[tuple[Any, ...]] = []

    def plain(*arguments: Any) -> Any:
        given_to.append(arguments)
        return plain_best_columns(*arguments)

    monkeypatch.setattr(window_search, "has_kernel", lambda device: True)
    monkeypatch.setattr(window_search, "agrees", lambda *asked: works)
    monkeypatch.setattr(window_search, "best_columns", plain)
    # As in training on a device, where rounded scores decide.
    monkeypatch.setattr(search, "doubt", lambda query: None)
    kept = search(query)
    assert len(given_to) == works and all(bias is None for *_, bias, _ in given_to)
    assert torch.equal(kept.index, wanted.index) and torch.equal(kept.mask, wanted.mask)


def test_a_kernel_that_does_not_work_here_is_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def broken(device: torch.device) -> bool:
        asked.append(device)
        raise RuntimeError("out of resources: registers")

    here = torch.device("cpu")
    assert not agrees(broken, "search", here) and not agrees(broken, "search", here)
    assert not agrees(lambda device: False, "search", here) and agrees(lambda device: True, "search", here)
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("tandemrec: search: the Triton")]
    assert len(asked) == 1 and len(lines) == 2
    assert "RuntimeError: out of resources: registers" in lines[0] and "differ" in lines[1]


@pytest.mark.gpu
@settings(max_examples=60, deadline=None)
@given(searched())
def test_a_device_keeps_what_a_slow_search_keeps(given_to: Searched) -> None:
    check(given_to.on(torch.device("cuda")))


@pytest.mark.gpu
@pytest.mark.parametrize("stretch", [True, False])
@pytest.mark.parametrize(("dim", "width", "candidates"), [(16, 10_000, 4), (64, 1_000, 200), (128, 3_000, 4)])
def test_a_device_ranks_real_scores(stretch: bool, dim: int, width: int, candidates: int) -> None:
    """As the CPU does, up to scores that lie closer than rounding."""
    made = drawn_long(stretch, dim, width, candidates)
    there = made.on(torch.device("cuda"))
    found = window_search.best_columns(there.query, there.key, there.windows, there.bias, 20)
    column, mask = (part.cpu() for part in found)
    score = all_scores(made)
    kth = score.topk(20).values[:, -1:]
    assert mask.all() and (score.gather(1, column) >= kth - 1e-4).all()
    assert (column[:, 1:] > column[:, :-1]).all()


@pytest.mark.gpu
def test_a_device_is_not_waited_for() -> None:
    there = drawn_long(True).on(torch.device("cuda"))
    windows = replace(there.windows, counts=(4, 1))
    window_search.best_columns(there.query, there.key, windows, there.bias, 20)
    torch.cuda.set_sync_debug_mode("error")
    try:
        window_search.best_columns(there.query, there.key, windows, there.bias, 20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
