"""The training search, change by change: what each gained, and what was tried and gained nothing.

    python -m benchmarks.search_changes

prints two tables: the search with each change added, and single pieces beside what they would replace. One
thread; all ways of a shape are interleaved in one run and must keep the same behaviors. Milliseconds are of
the processor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.model.ops import top
from trainer.model.ops.top import top_columns, top_columns_by_topk
from trainer.model.retrieve import slices
from trainer.model.retrieve.dot import DotSearch
from trainer.model.retrieve.score import AttentionVectors, DotScorer
from trainer.model.retrieve.search import Query
from trainer.model.time import Marks
from trainer.model.windows import Slots, Windows

# Windows, candidates of each, L, width.
SHAPES = (
    (512, 4, 200, 16),
    (104, 19, 1_000, 16),
    (20, 4, 10_000, 16),
    (20, 4, 10_000, 128),
    (2, 4, 100_000, 64),
)
K, REPEATS, SEED = 20, 5, 0
Way = Callable[[], object]


def query_of(windows: int, candidates: int, length: int, dim: int) -> Query:
    rng = torch.Generator().manual_seed(SEED)
    index = torch.arange(1, windows + 1)[:, None] * length - 1 - torch.arange(length)
    zero, of_candidate = torch.zeros_like(index), torch.arange(windows).repeat_interleave(candidates)
    mask, lengths = torch.ones_like(index, dtype=torch.bool), torch.full((windows,), length)
    made = Windows(index, mask, Marks(zero, zero, zero), None, of_candidate, lengths)
    scorer = DotScorer(None, None, 1, None, None)
    count = windows * candidates
    query, key = torch.randn(count, dim, generator=rng), torch.randn(windows * length, dim, generator=rng)
    vectors = scorer.encode(AttentionVectors(query, key, torch.zeros(count, dtype=torch.int64)))
    return Query(scorer, vectors, vectors, made)


def gathered_scores(query: Query, copies: bool) -> Tensor:
    """[C, X] from a gathered copy of all windows; `copies`: as it was first."""
    vectors, windows = query.vectors, query.windows
    slots = Slots(windows.of_candidate, windows.index.shape[0])
    slots.full = slots.full and not copies
    bias = query.scorer._window_bias(vectors, windows)[:, None, :]
    key_WXD = F.embedding(windows.index, vectors.key_ND)
    score = slots.collect(torch.baddbmm(bias, slots.spread(vectors.query_CD), key_WXD.transpose(1, 2)))
    return torch.stack([score], dim=1)[:, 0] if copies else score


def sliced(query: Query, few: int) -> Tensor:
    with mock.patch.object(slices, "_FEW", few):
        assert isinstance(query.scorer, DotScorer)
        return slices.columns_of_slices(query.scorer, query.vectors, query.windows, K, query.doubt())[0]


@contextmanager
def setting(module: object, name: str, value: int) -> Iterator[None]:
    with mock.patch.object(module, name, value):
        yield


def without_prefilter(score: Tensor) -> Tensor:
    with setting(top, "_COLUMNS", 1 << 40):
        return top_columns(score, K)[0]


def changes(query: Query) -> dict[str, Way]:
    """Each with those above it; the last is what the trainer does at any shape."""

    def now() -> Tensor:
        fresh = replace(query, windows=replace(query.windows))
        return DotSearch(K).columns(fresh)[0]

    return {
        "as it was: gather, baddbmm, topk": lambda: top_columns_by_topk(gathered_scores(query, True), K)[0],
        "no copies of the scores": lambda: top_columns_by_topk(gathered_scores(query, False), K)[0],
        "K-th best value, not topk": lambda: without_prefilter(gathered_scores(query, False)),
        "groups' best first": lambda: top_columns(gathered_scores(query, False), K)[0],
        "slices, not gathered": lambda: sliced(query, 0),
        "few candidates from the keys' side": lambda: sliced(query, slices._FEW),
        "each where it pays: the trainer": now,
    }


def by_value(query: Query, kept: Tensor) -> Tensor:
    return gathered_scores(query, False).gather(1, kept).sort(dim=1).values


def milliseconds(ways: dict[str, Way]) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(REPEATS):
        for name, way in ways.items():
            started = time.process_time()
            way()
            taken[name].append(1e3 * (time.process_time() - started))
    return {name: statistics.median(each) for name, each in taken.items()}


def tried(query: Query) -> dict[str, dict[str, Way]]:
    """Pieces, each beside what it would replace (the first of its group)."""
    windows, vectors = query.windows, query.vectors
    score = gathered_scores(query, False)
    key_WXD = F.embedding(windows.index, vectors.key_ND)
    query_WSD = windows.slots.spread(vectors.query_CD)
    halves = {kind: (vectors.key_ND.to(kind), query_WSD.to(kind)) for kind in (torch.bfloat16, torch.float16)}
    out, array, width = torch.empty_like(score), score.numpy(), score.shape[1]
    ranked = {
        "top_columns": lambda: top_columns(score, K),
        "torch.topk": lambda: score.topk(K + 1, dim=1),
        "torch.topk, sorted = False": lambda: score.topk(K + 1, dim=1, sorted=False),
        "torch.kthvalue": lambda: score.kthvalue(width - K, dim=1),
        "torch.sort": lambda: score.sort(dim=1, descending=True),
        "numpy.argpartition": lambda: np.argpartition(array, width - K, axis=1),
    }
    count = query_WSD.shape[0]

    def product(queries: Tensor, keys: Tensor) -> Tensor:
        return torch.bmm(queries, F.embedding(windows.index, keys).transpose(1, 2))

    scored = {
        "gather and bmm": lambda: product(query_WSD, vectors.key_ND),
        "bmm alone": lambda: torch.bmm(query_WSD, key_WXD.transpose(1, 2)),
        "bmm alone, out=": lambda: torch.bmm(
            query_WSD, key_WXD.transpose(1, 2), out=out.view(count, -1, width)
        ),
        **{
            f"gather and bmm, {str(kind)[6:]}": lambda key=key, q=q: product(q, key)
            for kind, (key, q) in halves.items()
        },
        "torch.compile of gather and bmm": lambda: compiled(query_WSD, windows.index, vectors.key_ND),
    }
    return {"ranking": ranked, "scores": scored}


@torch.compile(dynamic=False)
def compiled(query_WSD: Tensor, index_WX: Tensor, key_ND: Tensor) -> Tensor:
    """For the compiler to fuse the gather into the product."""
    return torch.bmm(query_WSD, F.embedding(index_WX, key_ND).transpose(1, 2))


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    names = [f"{w} x {s}, L = {length:,}, D = {dim}" for w, s, length, dim in SHAPES]
    queries = [query_of(*shape) for shape in SHAPES]
    found = []
    for query in queries:
        ways = changes(query)
        wanted = by_value(query, ways["as it was: gather, baddbmm, topk"]())  # type: ignore[arg-type]
        for way in ways.values():
            torch.testing.assert_close(by_value(query, way()), wanted)  # type: ignore[arg-type]
        found.append(milliseconds(ways))
    print(f"ms of the processor, n = {REPEATS}, K = {K}, seed {SEED}; (gain over the first row)\n")
    print("\n".join(rows(["change", *names], found)))
    more = [
        {f"{group}: {name}": way for group, ways in tried(query).items() for name, way in ways.items()}
        for query in queries
    ]
    print("\n".join(["", *rows(["piece", *names], [milliseconds(ways) for ways in more], gain=False)]))


def rows(head: list[str], found: list[dict[str, float]], gain: bool = True) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * len(found)}"]
    for name in found[0]:
        first = [next(iter(each.values())) for each in found]
        cells = [
            f"{each[name]:.2f}" + (f" ({was / each[name]:.1f}x)" if gain else "")
            for each, was in zip(found, first, strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
