"""Stage one for serving: one request at a time, in tiles that stay in the cache.

Training scores all windows of a batch at once, padded to the longest. A server has few requests of very
different length and up to 50,000 behaviors each, so here every window is scored alone, candidates in chunks,
which bounds memory and makes a request independent of its company. The result is that of the search it
stands for (property test), whatever the scorer and the kind of search.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.model.ops.top import best_of_groups, groups_of, top_of_groups
from trainer.model.retrieve.dot import DotSearch
from trainer.model.retrieve.score import AttentionVectors, DotScorer
from trainer.model.retrieve.search import Query, Search
from trainer.model.windows import Selection, Windows

# Columns of a tile: wide enough for the matrix product, and still in the cache when its best are noted.
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
        # Memory for scores that is used again: fresh pages would cost as much as filling them.
        self._cells = torch.empty(0)

    def select(self, query: Query) -> Selection:
        windows, count = query.windows, query.vectors.query_CD.shape[0]
        bounds = torch.bincount(windows.of_candidate, minlength=windows.index.shape[0]).cumsum(0).tolist()
        lengths = windows.mask.sum(1).tolist()
        # After a hard search every candidate has a short window of its own: together they are cheaper.
        if not count or (len(lengths) == count > 1 and windows.index.numel() <= _CELLS):
            selection: Selection = self.inner(query)
            return selection
        parts = []
        for window, (begin, end) in enumerate(pairwise([0, *bounds])):
            if end > begin:
                single = _single_window(query, window, lengths[window], begin, end)
                for column, mask in self._of_window(single, lengths[window]):
                    missing = self.k - column.shape[1]
                    parts.append((F.pad(column, (0, missing)), F.pad(mask, (0, missing))))
        column, mask = (torch.cat(each) for each in zip(*parts, strict=True))
        return windows.columns(column, mask)

    def _of_window(self, query: Query, length: int) -> list[tuple[Tensor, Tensor]]:
        scorer = query.scorer
        if type(self.inner) is DotSearch and isinstance(scorer, DotScorer) and scorer.heads == 1 and length:
            return self._dot_columns(scorer, query)
        count = query.vectors.query_CD.shape[0]
        size = max(1, _CELLS // max(length, 1))
        chunks = (_candidates(query, at, min(at + size, count)) for at in range(0, count, size))
        return [self.inner.columns(chunk) for chunk in chunks]

    def _dot_columns(self, scorer: DotScorer, query: Query) -> list[tuple[Tensor, Tensor]]:
        """Top-K by inner product, some candidates at a time."""
        width = query.windows.index.shape[1]
        # What is added to a behavior's scores is one more dimension, in which every candidate has 1.
        bias_X1 = scorer._window_bias(query.vectors, query.windows)[0][:, None]
        keys_XD = F.embedding(query.windows.index[0], query.vectors.key_ND)
        biased = bool(bias_X1.any())
        keys_XD = torch.cat([keys_XD, bias_X1], dim=1) if biased else keys_XD
        groups, doubt = min(groups_of(self.k), width), query.doubt()
        size = max(_FEWEST, _CACHED // width)
        columns = []
        for begin in range(0, query.vectors.query_CD.shape[0], size):
            chunk = _candidates(query, begin, begin + size)
            query_CD = chunk.vectors.query_CD
            query_CD = F.pad(query_CD, (0, 1), value=1.0) if biased else query_CD
            cells = query_CD.shape[0] * width
            if self._cells.numel() < cells:
                self._cells = torch.empty(cells)
            score_CX = self._cells[:cells].view(-1, width)
            beside_CX = scorer._target_bias(chunk.vectors, chunk.windows)
            best_CG = _score(score_CX, query_CD, keys_XD, beside_CX, groups)
            columns.append(top_of_groups(score_CX, best_CG, self.k, doubt=doubt.cut(begin, begin + size)))
        return columns


def per_window(search: Search) -> Search:
    """The search that serves in place of one of training; one that keeps whole windows stays as it is."""
    return search if search.keeps_all or isinstance(search, WindowSearch) else WindowSearch(search)


def _single_window(query: Query, window: int, length: int, begin: int, end: int) -> Query:
    """One window, cut to its own length, and its candidates."""
    part, whole = slice(window, window + 1), query.windows

    def cut(each: Tensor) -> Tensor:
        return each[part, : max(length, 1)]

    size = None if whole.log_size is None else cut(whole.log_size)
    of_candidate = torch.zeros(whole.of_candidate.numel(), dtype=torch.int64, device=whole.index.device)
    windows = Windows(cut(whole.index), cut(whole.mask), whole.marks.each(cut), size, of_candidate)
    return _candidates(replace(query, windows=windows), begin, end)


def _candidates(query: Query, begin: int, end: int) -> Query:
    """Some candidates of one window."""
    chosen = slice(begin, end)

    def cut(vectors: AttentionVectors) -> AttentionVectors:
        return replace(vectors, query_CD=vectors.query_CD[chosen], group_C=vectors.group_C[chosen])

    windows = replace(query.windows, of_candidate=query.windows.of_candidate[chosen])
    ids_C = None if query.ids_C is None else query.ids_C[chosen]
    return replace(query, vectors=cut(query.vectors), raw=cut(query.raw), windows=windows, ids_C=ids_C)


def _score(
    score_CX: Tensor, query_CD: Tensor, keys_XD: Tensor, beside_CX: Tensor | None, groups: int
) -> Tensor:
    """Fill in all scores; -> the best of each group [C, G], taken while a tile is in the cache."""
    width = score_CX.shape[1]
    best_CG = torch.full((score_CX.shape[0], groups), -torch.inf)
    step = max(_TILE // groups, 1) * groups
    for start in range(0, width, step):
        tile = score_CX[:, start : start + step]
        torch.mm(query_CD, keys_XD[start : start + step].T, out=tile)
        if beside_CX is not None:
            tile += beside_CX[:, start : start + step]
        some = best_CG[:, : tile.shape[1]]
        torch.maximum(some, best_of_groups(tile, groups), out=some)
    return best_CG
