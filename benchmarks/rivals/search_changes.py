"""The training search change by change, from its first form on, and pieces that gained nothing.

All ways of a shape must keep the same behaviors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.inputs.windows import full_windows
from trainer.model.ops import top
from trainer.model.ops.top import top_columns, top_columns_by_topk
from trainer.model.retrieve import slices
from trainer.model.retrieve.dot import DotSearch
from trainer.model.retrieve.score import DotScorer
from trainer.model.retrieve.search import Query
from trainer.model.windows import Slots

# Windows, candidates of each, L, width.
SHAPES = (
    (512, 4, 200, 16),
    (104, 19, 1_000, 16),
    (20, 4, 10_000, 16),
    (20, 4, 10_000, 128),
    (2, 4, 100_000, 64),
)
K = 20
Way = Callable[[], object]


def query_of(windows: int, candidates: int, length: int, dim: int) -> Query:
    scorer = DotScorer(None, None, 1, None, None)
    made, raw = full_windows(windows, candidates, length, dim, seed=0)
    # As a batch that was not collated: the trainer counts candidates itself.
    vectors = scorer.encode(raw)
    return Query(scorer, vectors, vectors, replace(made, counts=None))


def gathered_scores(query: Query, copies: bool) -> Tensor:
    """Scores [C, X] from a gathered copy of all windows; `copies`: with the copies of the first form."""
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
    """Each change includes those above it. The last one is what the trainer does at any shape."""

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


def tried(query: Query) -> dict[str, dict[str, Way]]:
    """Pieces beside the piece that each would replace, which is the first of its list."""
    windows, vectors = query.windows, query.vectors
    score = gathered_scores(query, False)
    key_WXD = F.embedding(windows.index, vectors.key_ND)
    query_WSD = windows.slots.spread(vectors.query_CD)
    halves = {kind: (vectors.key_ND.to(kind), query_WSD.to(kind)) for kind in (torch.bfloat16, torch.float16)}
    out, array, width = torch.empty_like(score), score.numpy(), score.shape[1]
    ranked: dict[str, Way] = {
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

    # For the compiler to fuse the gather into the product. Even the decorator takes seconds.
    compiled = torch.compile(product, dynamic=False)
    scored: dict[str, Way] = {
        "gather and bmm": lambda: product(query_WSD, vectors.key_ND),
        "bmm alone": lambda: torch.bmm(query_WSD, key_WXD.transpose(1, 2)),
        "bmm alone, out=": lambda: torch.bmm(
            query_WSD, key_WXD.transpose(1, 2), out=out.view(count, -1, width)
        ),
        **{f"gather and bmm, {str(kind)[6:]}": partial(product, q, key) for kind, (key, q) in halves.items()},
        "torch.compile of gather and bmm": lambda: compiled(query_WSD, vectors.key_ND),
    }
    return {"ranking": ranked, "scores": scored}
