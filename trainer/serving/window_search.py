"""Stage one for serving: one request at a time, in tiles that stay in the cache.

Training scores all windows of a batch at once, padded to the longest. A server has few requests of very
different length and up to 50,000 behaviors each, so here every window is scored alone, candidates in chunks,
which bounds memory and makes a request independent of its company. The result is that of the search it
stands for (property test), whatever the scorer and the kind of search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.model.ops.top import Floats, Ints, best_of_reaching, reaching_of_tiles
from trainer.model.retrieve.dot import DotSearch
from trainer.model.retrieve.score import AttentionVectors, DotScorer
from trainer.model.retrieve.search import Query, Search
from trainer.model.time import Marks
from trainer.model.windows import Selection, Windows
from trainer.serving.threads import in_threads

# Columns of a tile, and groups of columns whose best score is noted: wide enough for the matrix product, and
# still in the cache when the best are noted.
_TILE = 2048
# Scores of a chunk of candidates that the cache of a core or its neighbors holds, and the fewest candidates
# of a chunk: a matrix product of fewer reads the keys too often.
_CACHED, _FEWEST = 1 << 20, 128
# Scores held at once by searches of other kinds.
_CELLS = 8 << 20


class WindowSearch(Search):
    """The same as `inner`, window by window."""

    def __init__(self, inner: Search) -> None:
        super().__init__(inner.k)
        self.inner = inner
        # Memory of each thread for scores that is used again: fresh pages would cost as much as filling them.
        self._cells: dict[int, Tensor] = {}

    def of_behaviors(self, key_ND: Tensor) -> dict[str, Tensor]:
        return self.inner.of_behaviors(key_ND)

    def select(self, query: Query) -> Selection:
        windows, count = query.windows, query.vectors.query_CD.shape[0]
        bounds = torch.bincount(windows.of_candidate, minlength=windows.index.shape[0]).cumsum(0).tolist()
        lengths = windows.mask.sum(1).tolist()
        # After a hard search every candidate has a short window of its own: together they are cheaper.
        if not count or (len(lengths) == count > 1 and windows.index.numel() <= _CELLS):
            selection: Selection = self.inner(query)
            return selection
        scorer = query.scorer
        with_scores = type(self.inner) is DotSearch and isinstance(scorer, DotScorer) and scorer.heads == 1
        parts: list[Sequence[Tensor]] = []
        for window, (begin, end) in enumerate(pairwise([0, *bounds])):
            if end > begin:
                single = _single_window(query, window, lengths[window], begin, end)
                for found in self._of_window(single, lengths[window], with_scores):
                    missing = self.k - found[0].shape[1]
                    parts.append([F.pad(each, (0, missing)) for each in found] if missing else found)
        joined = parts[0] if len(parts) == 1 else [torch.cat(each) for each in zip(*parts, strict=True)]
        selection = _kept(windows, joined[0], joined[1])
        return replace(selection, score=joined[2]) if with_scores else selection

    def _of_window(self, query: Query, length: int, with_scores: bool) -> list[Sequence[Tensor]]:
        """Columns of each candidate, which count, and their scores if these are asked for."""
        scorer = query.scorer
        if with_scores and length:
            assert isinstance(scorer, DotScorer)
            return [self._dot_columns(scorer, query)]
        if with_scores:
            column, mask = self.inner.columns(query)
            return [(column, mask, torch.zeros(mask.shape))]
        count = query.vectors.query_CD.shape[0]
        size = max(1, _CELLS // max(length, 1))
        chunks = (_candidates(query, at, min(at + size, count)) for at in range(0, count, size))
        return [self.inner.columns(chunk) for chunk in chunks]

    def _dot_columns(self, scorer: DotScorer, query: Query) -> tuple[Tensor, Tensor, Tensor]:
        """Top-K by inner product, some candidates at a time, from the keys where they lie."""
        windows, count = query.windows, query.vectors.query_CD.shape[0]
        width, stretch = windows.index.shape[1], windows.lengths is not None and scorer.shares_bias
        bias_WX = scorer.window_bias(query.vectors, windows)
        if stretch:
            # Newest last: a stretch of the batch's behaviors.
            end = int(windows.index[0, 0]) + 1
            keys_XD = query.vectors.key_ND[end - width : end]
            bias_WX = None if bias_WX is None else bias_WX.flip(1)
        else:
            keys_XD = F.embedding(windows.index[0], query.vectors.key_ND)
        biased = False
        if bias_WX is not None and bool(bias_WX.any()):
            biased = True
            # What is added to a behavior's scores is one more dimension, in which every candidate has 1.
            keys_XD = torch.cat([keys_XD, bias_WX[0][:, None]], dim=1)
        doubt = query.doubt()
        doubt = doubt.mirrored(width) if stretch else doubt
        query_CD = query.vectors.query_CD
        query_CD = F.pad(query_CD, (0, 1), value=1.0) if biased else query_CD
        tiles = max(1, round(width / _TILE))
        keys = [keys_XD[tile::tiles].T for tile in range(tiles)]
        size = max(_FEWEST, _CACHED // width)

        def best_of(begin: int, thread: int) -> tuple[Ints, Floats]:
            end = min(begin + size, count)
            beside_CX = None
            if not scorer.shares_bias:
                chunk = _candidates(query, begin, end)
                beside_CX = scorer._target_bias(chunk.vectors, chunk.windows)
            scores = self._room(thread, (tiles, end - begin, keys[0].shape[1]))
            best_CG = _score(scores, query_CD[begin:end], keys, beside_CX)
            place, value = reaching_of_tiles(scores, best_CG, width, self.k, doubt.cut(begin, end))
            return place + begin * width, value

        # The same chunks whatever the threads: a product may round by its shape.
        found = in_threads(best_of, range(0, count, size))
        places, values = (np.concatenate(part) for part in zip(*found, strict=True))
        # Of all candidates at once: close scores are settled in one go.
        return best_of_reaching(places, values, count, width, self.k, last=stretch, doubt=doubt)

    def _room(self, thread: int, shape: tuple[int, int, int]) -> Tensor:
        """Memory of a thread, not cleared."""
        cells, held = math.prod(shape), self._cells.get(thread)
        if held is None or held.numel() < cells:
            held = self._cells[thread] = torch.empty(cells)
        return held[:cells].view(shape)


def per_window(search: Search) -> Search:
    """The search that serves in place of one of training; one that keeps whole windows stays as it is."""
    return search if search.keeps_all or isinstance(search, WindowSearch) else WindowSearch(search)


def _kept(windows: Windows, column_CK: Tensor, mask_CK: Tensor) -> Selection:
    """`Windows.columns`; faster where a single stretch is kept from and no candidate keeps less than K."""
    if windows.lengths is None or windows.index.shape[0] > 1 or not bool(mask_CK.all()):
        return windows.columns(column_CK, mask_CK)
    marks, nothing = windows.marks, windows.marks.level[:1, :1].expand(column_CK.shape)
    age_CK = marks.age.take(column_CK)
    found = Marks((column_CK + 1).to(marks.position.dtype), age_CK, nothing)
    return Selection(windows.index[0, 0] - column_CK, mask_CK, found)


def _single_window(query: Query, window: int, length: int, begin: int, end: int) -> Query:
    """One window, cut to its own length, and its candidates."""
    part, whole = slice(window, window + 1), query.windows

    def cut(each: Tensor) -> Tensor:
        return each[part, : max(length, 1)]

    size = None if whole.log_size is None else cut(whole.log_size)
    of_candidate = torch.zeros(whole.of_candidate.numel(), dtype=torch.int64, device=whole.index.device)
    marks, lengths = whole.marks.each(cut), None if whole.lengths is None else whole.lengths[part]
    windows = Windows(cut(whole.index), cut(whole.mask), marks, size, of_candidate, lengths)
    return _candidates(replace(query, windows=windows), begin, end)


def _candidates(query: Query, begin: int, end: int) -> Query:
    """Some candidates of one window."""
    chosen = slice(begin, end)

    def cut(vectors: AttentionVectors) -> AttentionVectors:
        return replace(vectors, query_CD=vectors.query_CD[chosen], group_C=vectors.group_C[chosen])

    windows = replace(query.windows, of_candidate=query.windows.of_candidate[chosen])
    ids_C = None if query.ids_C is None else query.ids_C[chosen]
    return replace(query, vectors=cut(query.vectors), raw=cut(query.raw), windows=windows, ids_C=ids_C)


def _score(score_TCG: Tensor, query_CD: Tensor, keys: Sequence[Tensor], beside_CX: Tensor | None) -> Tensor:
    """Fill in all scores, tile by tile; -> the best of each group [C, G], taken while a tile is in the cache.

    Args:
        keys: [D, G] of each tile, or a column less; column g of tile t is column g * T + t of the window.
    """
    best_CG = score_TCG[0] if len(keys) == 1 else torch.empty(score_TCG.shape[1:])
    for tile, (score_CG, key_DG) in enumerate(zip(score_TCG, keys, strict=True)):
        own = key_DG.shape[1]
        if own < score_CG.shape[1]:
            score_CG[:, own:] = -torch.inf
        torch.mm(query_CD, key_DG, out=score_CG[:, :own])
        if beside_CX is not None:
            score_CG[:, :own] += beside_CX[:, tile :: len(keys)]
        if tile:
            torch.maximum(score_TCG[0] if tile == 1 else best_CG, score_CG, out=best_CG)
    return best_CG
