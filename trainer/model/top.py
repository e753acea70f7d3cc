"""The K best columns of each row of scores, exactly; ties go to the lower column.

On the CPU `torch.topk` writes a pair of value and place for every score before it looks at any. Nearly all of
the work here is done on bare values instead: find what the K-th best score is, then where scores reach it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Floats = NDArray[np.float32]
# Scores of a block whose best one is noted first. A block is one or a few vector registers.
BLOCK = 32
# Fewer blocks than so many times K tell too little apart.
_ENOUGH = 6


def top_columns(score_CX: Tensor, k: int, *, last: bool = False) -> tuple[Tensor, Tensor]:
    """The K best columns of each row, ascending, and which of them count; ties go to the lower column.

    `topk` alone keeps any of several equal scores, which one depending on the width of the tensor, so that
    a request would be scored differently in other company. -inf is never kept; NaN counts as the best.

    Args:
        last: columns are counted from the end of the row, which ties go to then.

    Returns:
        int64 and bool, both [C, min(K, X)].
    """
    if score_CX.device.type != "cpu" or score_CX.dtype != torch.float32 or not score_CX.numel():
        return top_columns_by_topk(score_CX.flip(1) if last else score_CX, k)
    column, count = _best(score_CX.detach().contiguous().numpy(), k, last)
    slot = np.arange(column.shape[1])
    mask = slot < count[:, None]
    if last:
        backwards = np.where(mask, count[:, None] - 1 - slot, slot)
        width = score_CX.shape[1]
        column = np.where(mask, width - 1 - np.take_along_axis(column, backwards, 1), width - 1)
    return torch.from_numpy(column), torch.from_numpy(mask)


def top_columns_by_topk(score_CX: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same by torch's own operators: for devices, and the reference of the property test."""
    width = score_CX.shape[1]
    best = score_CX.topk(min(k + 1, width), dim=1)
    column_CK, value_CK = best.indices[:, :k], best.values[:, :k]
    if width > k:
        tied = (best.values[:, k - 1] == best.values[:, k]) & (best.values[:, k] > -torch.inf)
        rows = torch.nonzero(tied).squeeze(1)
        if rows.numel():
            exact = score_CX[rows].sort(dim=1, descending=True, stable=True)
            column_CK = column_CK.index_copy(0, rows, exact.indices[:, :k])
            value_CK = value_CK.index_copy(0, rows, exact.values[:, :k])
    return ascending(column_CK, ~(value_CK == -torch.inf), width)


def ascending(column_CK: Tensor, mask_CK: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Columns that count in their order, then the others, clamped into the window."""
    order_CK = torch.where(mask_CK, column_CK, width).sort(dim=1)
    return order_CK.values.clamp(max=width - 1), order_CK.values < width


def _best(score: Floats, k: int, last: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """-> columns [C, min(K, X)], ascending, X - 1 beyond the first `count[c]` of them; count [C]."""
    width = score.shape[1]
    size = BLOCK
    while size > 1 and width // size < _ENOUGH * k:
        size //= 2
    if size < 8 or k >= width:
        return _reaching(score, k, last)
    columns, few = _prefiltered(score, k, size)
    place, count = _reaching(few, k, last)
    found = np.take_along_axis(columns, place, 1)
    found[np.arange(place.shape[1]) >= count[:, None]] = width - 1
    return found, count


def _reaching(score: Floats, k: int, last: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find the K-th best score of each row, then where it is reached."""
    rows, width = score.shape
    hit = score > -np.inf if k >= width else ~(score < _kth(score, k)[:, None])
    count = np.count_nonzero(hit, axis=1)
    odd = np.flatnonzero(count > k)
    if odd.size:
        hit[odd] = _tied(score[odd, ::-1], k)[:, ::-1] if last else _tied(score[odd], k)
        count[odd] = np.count_nonzero(hit[odd], axis=1)
    row, column = np.divmod(np.flatnonzero(hit), width)
    if count.min() == k:
        return column.reshape(rows, k), count
    found = np.full((rows, min(k, width)), width - 1, dtype=np.int64)
    found[row, np.arange(row.size) - np.repeat(np.cumsum(count) - count, count)] = column
    return found, count


def _kth(score: Floats, k: int) -> Floats:
    """The K-th best of each row; NaN is the best."""
    place = score.shape[1] - k
    kth: Floats = np.partition(score, place, axis=1)[:, place]
    return kth


def _tied(score: Floats, k: int) -> NDArray[np.bool_]:
    """Where more than K scores of a row reach its K-th best: which of them are kept."""
    score = np.where(np.isnan(score), np.float32(np.inf), score)
    kth = _kth(score, k)[:, None]
    above, level = score > kth, (score == kth) & (kth > -np.inf)
    free = k - np.count_nonzero(above, axis=1)
    kept: NDArray[np.bool_] = above | (level & (np.cumsum(level, axis=1) <= free[:, None]))
    return kept


def _prefiltered(score: Floats, k: int, size: int) -> tuple[NDArray[np.int64], Floats]:
    """-> columns that may be among the K best, ascending, and their scores, -inf where a row has fewer.

    K blocks have a best score of at least the K-th best of the blocks' best, so K scores are at least that,
    and all scores of the K best are: only blocks that reach it are looked into.
    """
    rows, width = score.shape
    blocks = -(-width // size)
    padded = score
    if blocks * size != width:
        padded = F.pad(torch.from_numpy(score), (0, blocks * size - width), value=-torch.inf).numpy()
    split = torch.from_numpy(padded).view(rows, blocks, size)
    best: Floats = split.amax(2).numpy()
    least = _kth(best, k)
    row, block = np.divmod(np.flatnonzero(~(best < least[:, None])), blocks)
    inside = split.numpy()[row, block]
    hit = np.flatnonzero(~(inside < least[row, None]))
    row, column = row[hit // size], block[hit // size] * size + hit % size
    count = np.bincount(row, minlength=rows)
    slot = np.arange(row.size) - np.repeat(np.cumsum(count) - count, count)
    shape = rows, max(int(count.max()), k)
    few = np.full(shape, -np.inf, dtype=np.float32)
    columns = np.full(shape, width - 1, dtype=np.int64)
    few[row, slot] = inside.ravel()[hit]
    columns[row, slot] = column
    return columns, few
