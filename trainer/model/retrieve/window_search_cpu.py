"""The K best behaviors of each candidate's window by inner products on the CPU, by its kernel.

See `trainer.model.ops.top_products`. Keys are read where they lie: the window of a request is a stretch of
the batch's behaviors, newest last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.model.ops.top import Doubt
from trainer.model.ops.top_products import Piece, kernel, top_products
from trainer.model.retrieve.score import AttentionVectors, DotScorer, Scorer
from trainer.model.retrieve.slices import are_slices, multiplies
from trainer.model.windows import Windows

# Floats of a window's keys, and candidates a window: below that, one product for all windows is cheaper than
# a call for each.
_LEAST, _FEWEST = 1 << 12, 32
# Scores of one window that are held at once, where something is added to each by itself.
_CELLS = 1 << 20


def pays(scorer: Scorer, vectors: AttentionVectors, windows: Windows) -> bool:
    """Whether the kernel is there, scores are inner products of one head, and windows long, or one alone."""
    (count, width), (candidates, dim) = windows.index.shape, vectors.query_CD.shape
    many = width * dim >= _LEAST and candidates >= _FEWEST * count and are_slices(scorer, windows)
    return multiplies(scorer, vectors) and (count == 1 or many) and kernel() is not None


def best_columns(
    scorer: DotScorer, vectors: AttentionVectors, windows: Windows, k: int, doubt: Doubt
) -> tuple[Tensor, Tensor]:
    """The K best columns of each candidate's window, ascending, and which count: both [C, min(K, X)].

    `doubt`: of all candidates and the columns of their windows.
    """
    slices = are_slices(scorer, windows)
    pieces = list(_slices(scorer, vectors, windows) if slices else _of_one(scorer, vectors, windows))
    return top_products(vectors.query_CD, pieces, k, doubt, last=slices, by=kernel())


def _slices(scorer: DotScorer, vectors: AttentionVectors, windows: Windows) -> Iterator[Piece]:
    """A piece a window that holds something."""
    assert windows.lengths is not None
    bias_WX = scorer.window_bias(vectors, windows)
    # Windows are newest first, slices newest last.
    bias_WX = None if bias_WX is None else bias_WX.flip(1)
    ends, lengths = (windows.index[:, 0] + 1).tolist(), windows.lengths.tolist()
    for window, (length, end, (first, last)) in enumerate(zip(lengths, ends, windows.spans, strict=True)):
        if length and last > first:
            bias_X = None if bias_WX is None else bias_WX[window, bias_WX.shape[1] - length :]
            yield Piece(first, last, vectors.key_ND[end - length : end], bias_X)


def _of_one(scorer: DotScorer, vectors: AttentionVectors, windows: Windows) -> Iterator[Piece]:
    """Pieces of the only window, as many as what is added to scores by itself is cut into."""
    key_XD = F.embedding(windows.index[0], vectors.key_ND)
    bias_WX = scorer.window_bias(vectors, windows)
    if bias_WX is None and not bool(windows.mask.all()):
        bias_WX = torch.zeros(windows.mask.shape).masked_fill(~windows.mask, -torch.inf)
    bias_X = None if bias_WX is None else bias_WX[0]
    count = vectors.query_CD.shape[0]
    step = count if scorer.shares_bias else max(1, _CELLS // key_XD.shape[0])
    for first in range(0, count, step):
        some = slice(first, first + step)
        chunk = replace(vectors, query_CD=vectors.query_CD[some], group_C=vectors.group_C[some])
        beside = scorer._target_bias(chunk, replace(windows, of_candidate=windows.of_candidate[some]))
        yield Piece(first, min(first + step, count), key_XD, bias_X, beside)
