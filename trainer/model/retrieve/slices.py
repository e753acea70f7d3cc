"""Stage one over long windows on the CPU: scores from the vectors where they lie.

A request's window is a stretch of the batch's behaviors, newest last. Gathering it costs more than all that
is done with it: the copy is written, and read again by the product. Here every window is a slice of the key
matrix, and scores stand in the order of time and end at the last column, whatever a window's length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.model.ops.top import Doubt, top_columns
from trainer.model.retrieve.score import AttentionVectors, DotScorer, Scorer
from trainer.model.windows import Windows

# Floats of a window's keys: below that, one product for all windows is cheaper than a call for each.
_LEAST = 1 << 15
# Scores held at once; they stay in the cache until they are ranked.
_CELLS = 1 << 21
# Rows of scores are a multiple of so many floats, two cache lines, and start alike.
_LINE = 32
# So few candidates of so wide and many keys are multiplied from the other side: the library's product would
# first rearrange the keys, which are the larger part.
_FEW, _WIDE, _MANY = 8, 64, 1 << 19


@dataclass(frozen=True)
class _Window:
    """Candidates [first, last) see the `length` behaviors that end with `newest`; `number` of the window."""

    number: int
    first: int
    last: int
    newest: int
    length: int


@dataclass(frozen=True)
class _Tile:
    """Windows whose scores are ranked together."""

    windows: list[_Window]
    width: int

    @property
    def cells(self) -> int:
        return (self.windows[-1].last - self.windows[0].first) * self.width


def multiplies(scorer: Scorer, vectors: AttentionVectors) -> bool:
    """Whether there are scores, and they are inner products of one head, in float32 and on the CPU."""
    key_ND = vectors.key_ND
    return (
        isinstance(scorer, DotScorer)
        and scorer.heads == 1
        and key_ND.device.type == "cpu"
        and key_ND.dtype == vectors.query_CD.dtype == torch.float32
        and vectors.query_CD.shape[0] > 0
    )


def are_slices(scorer: Scorer, windows: Windows) -> bool:
    """Whether the windows are slices, whose columns' scores differ by products alone."""
    return windows.lengths is not None and scorer.shares_bias


def pays(scorer: Scorer, vectors: AttentionVectors, windows: Windows) -> bool:
    """Whether the windows are slices, scores inner products of one head, and the windows long."""
    long = windows.index.shape[1] * vectors.key_ND.shape[1] >= _LEAST
    return long and are_slices(scorer, windows) and multiplies(scorer, vectors)


@torch.no_grad()
def columns_of_slices(
    scorer: DotScorer, vectors: AttentionVectors, windows: Windows, k: int, doubt: Doubt
) -> tuple[Tensor, Tensor]:
    """The K best columns of each candidate's window, ascending, and which count: both [C, K].

    `doubt`: of all candidates and the columns of their windows.
    """
    bias_WX = scorer.window_bias(vectors, windows)
    # Windows are newest first, slices newest last.
    bias_WX = None if bias_WX is None else bias_WX.flip(1)
    tiles = list(_tiles(windows))
    # One buffer for all: fresh memory costs more than what is written to it.
    buffer = torch.empty(max(tile.cells for tile in tiles))
    best = []
    for tile in tiles:
        score_CX = _scores(vectors, tile, bias_WX, buffer)
        first, last = tile.windows[0].first, tile.windows[-1].last
        here = doubt.cut(first, last).mirrored(tile.width)
        column, mask = top_columns(score_CX, k, last=True, doubt=here)
        missing = k - column.shape[1]
        best.append((F.pad(column, (0, missing)), F.pad(mask, (0, missing))))
    columns, masks = zip(*best, strict=True)
    return torch.cat(columns).clamp(max=windows.index.shape[1] - 1), torch.cat(masks)


def _scores(vectors: AttentionVectors, tile: _Tile, bias_WX: Tensor | None, buffer: Tensor) -> Tensor:
    """Of the tile's candidates, ending at the last column; -inf before."""
    base, width = tile.windows[0].first, tile.width
    score_CX = buffer[: tile.cells].view(-1, width)
    for window in tile.windows:
        begin = width - window.length
        rows = score_CX[window.first - base : window.last - base]
        rows[:, :begin] = -torch.inf
        query_CD = vectors.query_CD[window.first : window.last]
        key_XD = vectors.key_ND[window.newest + 1 - window.length : window.newest + 1]
        if 1 < query_CD.shape[0] <= _FEW and key_XD.shape[1] >= _WIDE and key_XD.numel() >= _MANY:
            rows[:, begin:] = (key_XD @ query_CD.T).T
        else:
            torch.mm(query_CD, key_XD.T, out=rows[:, begin:])
        if bias_WX is not None:
            rows[:, begin:] += bias_WX[window.number, bias_WX.shape[1] - window.length :]
    return score_CX


def _tiles(windows: Windows) -> Iterator[_Tile]:
    """Runs of windows of few scores together; a window with many candidates may be several."""
    assert windows.lengths is not None
    lengths, newest = windows.lengths.tolist(), windows.index[:, 0].tolist()
    run: list[_Window] = []
    width = 0
    for number, (begin, end) in enumerate(windows.spans):
        wide = max(-(-lengths[number] // _LINE), 1) * _LINE
        for first in range(begin, end, max(1, _CELLS // wide)):
            last = min(first + max(1, _CELLS // wide), end)
            if run and (last - run[0].first) * max(width, wide) > _CELLS:
                yield _Tile(run, width)
                run, width = [], 0
            run.append(_Window(number, first, last, newest[number], lengths[number]))
            width = max(width, wide)
    if run:
        yield _Tile(run, width)
