"""Stage one over long windows on the CPU: scores from the vectors where they lie.

A request's window is a stretch of the batch's behaviors, newest last. Gathering it costs more than all that is
done with it: the copy is written, and read again by the product. Here every window is a slice of the key matrix,
and scores stand in the order of time and end at the last column, whatever a window's length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.model.score import Attended, DotScorer, Scorer
from trainer.model.top import top_columns
from trainer.model.windows import Windows

# Floats of a window's keys: below that, one product for all windows is cheaper than a call for each.
_LEAST = 1 << 14
# Scores held at once; they stay in the cache until they are ranked.
_CELLS = 1 << 20


@dataclass(frozen=True)
class _Window:
    """Candidates [first, last) see the `length` behaviors that end with `newest`; `number` of the window."""

    number: int
    first: int
    last: int
    newest: int
    length: int


def pays(scorer: Scorer, vectors: Attended, windows: Windows) -> bool:
    """Whether the windows are slices, scores inner products of one head, and the windows long."""
    key_ND = vectors.key_ND
    return (
        windows.contiguous
        and isinstance(scorer, DotScorer)
        and scorer.heads == 1
        and scorer.shares_bias
        and key_ND.device.type == "cpu"
        and key_ND.dtype == vectors.query_CD.dtype == torch.float32
        and windows.index.shape[1] * key_ND.shape[1] >= _LEAST
        and vectors.query_CD.shape[0] > 0
    )


@torch.no_grad()
def columns_of_slices(
    scorer: DotScorer, vectors: Attended, windows: Windows, k: int
) -> tuple[Tensor, Tensor]:
    """The K best columns of each candidate's window, ascending, and which count: both [C, K]."""
    bias_WX = scorer.window_bias(vectors, windows)
    # Windows are newest first, slices newest last.
    bias_WX = None if bias_WX is None else bias_WX.flip(1)
    found = []
    for tile in _tiles(windows):
        column, mask = top_columns(_scores(vectors, tile, bias_WX), k, last=True)
        missing = k - column.shape[1]
        found.append((F.pad(column, (0, missing)), F.pad(mask, (0, missing))))
    columns, masks = zip(*found, strict=True)
    return torch.cat(columns), torch.cat(masks)


def _scores(vectors: Attended, tile: list[_Window], bias_WX: Tensor | None) -> Tensor:
    """Of the tile's candidates, ending at the last column; -inf before."""
    width, base = max(*(window.length for window in tile), 1), tile[0].first
    score_CX = torch.empty(tile[-1].last - base, width)
    for window in tile:
        begin = width - window.length
        rows = score_CX[window.first - base : window.last - base]
        rows[:, :begin] = -torch.inf
        query_CD = vectors.query_CD[window.first : window.last]
        key_XD = vectors.key_ND[window.newest + 1 - window.length : window.newest + 1]
        if bias_WX is None:
            torch.mm(query_CD, key_XD.T, out=rows[:, begin:])
        else:
            bias_X = bias_WX[window.number, bias_WX.shape[1] - window.length :]
            torch.addmm(bias_X, query_CD, key_XD.T, out=rows[:, begin:])
    return score_CX


def _tiles(windows: Windows) -> Iterator[list[_Window]]:
    """Runs of windows of few scores together; a window with many candidates may be several."""
    lengths, newest = windows.mask.sum(1).tolist(), windows.index[:, 0].tolist()
    counts = torch.bincount(windows.of_candidate, minlength=len(lengths)).tolist()
    tile: list[_Window] = []
    cells = 0
    for number, (end, count) in enumerate(zip(accumulate(counts), counts, strict=True)):
        length = lengths[number]
        size = max(1, _CELLS // max(length, 1))
        for first in range(end - count, end, size):
            last = min(first + size, end)
            if tile and cells + (last - first) * length > _CELLS:
                yield tile
                tile, cells = [], 0
            tile.append(_Window(number, first, last, newest[number], length))
            cells += (last - first) * length
    if tile:
        yield tile
