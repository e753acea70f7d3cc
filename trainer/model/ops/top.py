"""The K best columns of each row of scores, exactly; ties go to the lower column.

`top_columns` chooses among three forms that keep the same columns (property test):

    plain    `top_columns_by_topk`   torch's `topk`, then a stable sort of the rows whose K-th best is tied
             or in doubt. It must know which these are, so that a device makes the host wait.
    CPU      `top_of_groups`         `topk` writes a pair of value and place for every score before it looks
             at any. Here columns are dealt out to groups, group g having g, g + G, g + 2 G, ..., whose best
             scores are found by comparing whole vectors of columns. K groups have a best score of at least
             the K-th largest of these, so K scores are at least that, and each of the K best is. Only what
             reaches it is ranked: few more than K.
    device   `top_columns_by_keys`   one `topk` of whole numbers that are all different. Nothing is tied,
             nobody waits.

With a `Doubt` about close scores, which is there to ask about them, a device takes the plain form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
# The least float32, which is more than the -inf that is never kept.
_LEAST = np.finfo(np.float32).min
# Groups, times K: the more, the closer the bound. Torch compares columns fast from so many on.
_TIMES, _FEWEST = 4, 128
# Columns of a group that pay; of fewer, each is a group of its own.
_COLUMNS = 2
# Keys of a device that are held at once, 512 MiB: 2,048 candidates with windows of 32,768.
_KEYS = 1 << 26
# `ordered_bits` of -inf.
_EMPTY = -0x7F800001


@dataclass(frozen=True)
class Doubt:
    """What a ranking by rounded scores must ask for, see `trainer.model.retrieve.exact`.

    Attributes:
        slack: float32 [rows], scores that lie no farther apart may be in the wrong order.
        exact: (rows [M], columns [M]) -> scores of these pairs, float64 [M].
    """

    slack: Tensor
    exact: Callable[[Tensor, Tensor], Tensor]

    def cut(self, begin: int, end: int) -> Doubt:
        """The doubt of the rows from `begin` to before `end`."""
        return Doubt(self.slack[begin:end], lambda row, column: self.exact(row + begin, column))

    def mirrored(self, width: int) -> Doubt:
        """The doubt of rows whose columns are counted from the end."""
        return Doubt(self.slack, lambda row, column: self.exact(row, width - 1 - column))


def top_columns(
    score_CX: Tensor, k: int, *, last: bool = False, doubt: Doubt | None = None
) -> tuple[Tensor, Tensor]:
    """The K best columns of each row, ascending, and which of them count; ties go to the lower column.

    `topk` alone keeps any of several equal scores, which one depending on the width of the tensor, so that
    a request would be scored differently in other company. -inf is never kept; NaN counts as the best, so
    that a model that has diverged shows it, in training and in serving.

    Args:
        last: columns are counted from the end of the row, which ties go to then.
        doubt: where given, columns whose scores are as good as equal are ranked by their exact scores.

    Returns:
        int64 and bool, both [C, min(K, X)]; columns that do not count are X - 1.
    """
    if score_CX.device.type == "cpu" and score_CX.dtype == torch.float32 and score_CX.numel():
        score_CX = score_CX.detach().contiguous()
        groups = groups_of(k)
        worth = score_CX.shape[1] >= _COLUMNS * groups
        best_CG = best_of_groups(score_CX, groups) if worth else score_CX
        return top_of_groups(score_CX, best_CG, k, last=last, doubt=doubt)
    if score_CX.device.type != "cpu" and score_CX.dtype == torch.float32 and doubt is None:
        return top_columns_by_keys(score_CX, k, last=last)
    if last:
        return top_columns_by_topk(score_CX.flip(1), k, doubt and doubt.mirrored(score_CX.shape[1]))
    return top_columns_by_topk(score_CX, k, doubt)


def top_columns_by_topk(score_CX: Tensor, k: int, doubt: Doubt | None = None) -> tuple[Tensor, Tensor]:
    """The plain form: for any type of number, for doubt on a device, and the reference of the others."""
    width = score_CX.shape[1]
    # NaN is the best, and no better than infinity.
    score_CX = score_CX.masked_fill(score_CX.isnan(), torch.inf)
    best = score_CX.topk(min(k + 1, width), dim=1)
    column_CK, value_CK = best.indices[:, :k], best.values[:, :k]
    if width > k:
        kth, next_C = best.values[:, k - 1], best.values[:, k]
        slack = 0.0 if doubt is None else doubt.slack.nan_to_num(0.0)
        # The difference of two infinities is no number.
        tied = ((kth - next_C <= slack) | (kth == next_C)) & ~(next_C == -torch.inf)
        rows = torch.nonzero(tied).squeeze(1)
        if rows.numel():
            score = score_CX[rows]
            if doubt is not None:
                # Only scores as close to the K-th as rounding are asked for: the others are in, or out.
                score = score.double().nan_to_num(torch.inf, torch.inf, -torch.inf)
                reach = doubt.slack[rows].double().nan_to_num(0.0)[:, None]
                border = kth[rows].double().nan_to_num(torch.inf)[:, None]
                sure = score > border + reach
                zone = ~sure & (score >= border - reach) & (score > -torch.inf)
                row, column = torch.nonzero(zone, as_tuple=True)
                score = torch.where(sure, torch.inf, -torch.inf).double()
                score[row, column] = doubt.exact(rows[row], column).nan_to_num(torch.inf)
            exact = score.sort(dim=1, descending=True, stable=True)
            column_CK = column_CK.index_copy(0, rows, exact.indices[:, :k])
            value_CK = value_CK.index_copy(0, rows, exact.values[:, :k].to(value_CK.dtype))
    return ascending(column_CK, ~(value_CK == -torch.inf), width)


def top_columns_by_keys(score_CX: Tensor, k: int, *, last: bool = False) -> tuple[Tensor, Tensor]:
    """The device form, of float32.

    The bits of a score, in an order that is that of the numbers, are the high half of a key, and the column
    is the low half, so that of two equal scores the lower column has the higher key. `topk` of keys has one
    right answer only, whatever algorithm it takes.
    """
    width = score_CX.shape[1]
    place = torch.arange(width, device=score_CX.device)
    # Columns are counted from the end with `last`.
    place = place if last else place.flip(0)
    best = []
    for rows_RX in score_CX.detach().split(max(1, _KEYS // width)):
        key_RX = ordered_bits(rows_RX).to(torch.int64).bitwise_left_shift_(32).bitwise_or_(place)
        best.append(key_RX.topk(min(k, width), dim=1, sorted=False).values)
    key_CK = best[0] if len(best) == 1 else torch.cat(best)
    return ascending(width - 1 - (key_CK & 0xFFFFFFFF), key_CK >> 32 > _EMPTY, width)


def ordered_bits(score: Tensor) -> Tensor:
    """float32 -> int32 in the order of the numbers; NaN is infinity, and the two zeros are one."""
    score = torch.where(score.isnan(), torch.inf, score + 0.0)
    bits = score.view(torch.int32)
    # Negative numbers have the sign bit; the greater the rest of the bits, the lower the number.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def ascending(column_CK: Tensor, mask_CK: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Columns that count in their order, then the others, clamped into the window."""
    order_CK = torch.where(mask_CK, column_CK, width).sort(dim=1)
    return order_CK.values.clamp(max=width - 1), order_CK.values < width


def groups_of(k: int) -> int:
    """G for the K best."""
    return max(_TIMES * k, _FEWEST)


def best_of_groups(score_CX: Tensor, groups: int) -> Tensor:
    """-> the best score of each group, [C, min(G, X)]."""
    whole, rest = divmod(score_CX.shape[1], groups)
    if not whole:
        return score_CX
    best_CG: Tensor = score_CX[:, : whole * groups].unflatten(1, (whole, groups)).amax(1)
    if rest:
        some = best_CG[:, :rest]
        torch.maximum(some, score_CX[:, whole * groups :], out=some)
    return best_CG


def top_of_groups(
    score_CX: Tensor, best_CG: Tensor, k: int, *, last: bool = False, doubt: Doubt | None = None
) -> tuple[Tensor, Tensor]:
    """`top_columns` of contiguous float32 on the CPU, from the best score of each of G groups of columns.

    Any groups do that have no column in common; `best_CG` may have -inf for groups that do not exist.
    """
    rows, width = score_CX.shape
    place, value = reaching(score_CX, best_CG, k, doubt)
    return best_of_reaching(place, value, rows, width, k, last=last, doubt=doubt)


def reaching(score_CX: Tensor, best_CG: Tensor, k: int, doubt: Doubt | None = None) -> tuple[Ints, Floats]:
    """The scores that may be among the K best of their row: places in the flat matrix, ascending, and scores.

    Arguments are those of `top_of_groups`.
    """
    score, best = score_CX.numpy(), best_CG.numpy()
    bound = _kth(best, k)
    if doubt is not None:
        bound = np.maximum(bound - _slack(doubt), _LEAST)
    # NaN is the best, but every comparison with it is false.
    place = np.flatnonzero(~(score < bound) if np.isnan(best).any() else score >= bound)
    return place, score.reshape(-1)[place]


def best_of_reaching(
    place: Ints,
    value: Floats,
    rows: int,
    width: int,
    k: int,
    *,
    last: bool = False,
    doubt: Doubt | None = None,
) -> tuple[Tensor, Tensor]:
    """`top_of_groups` from what `reaching` found of all rows."""
    hit = place
    if last:
        # The matrix from its end to its beginning, rows too.
        hit, value = rows * width - 1 - hit[::-1], value[::-1]
    reach, first = _filled(hit, rows, width)
    if reach.shape[1] > k:
        few = np.full(reach.shape, -np.inf, dtype=np.float32)
        few[reach] = value
        few[np.isnan(few)] = np.inf
        asked = None
        if doubt is not None:
            asked = _Asked(
                _slack(doubt)[::-1] if last else _slack(doubt), hit, first, rows * width, last, doubt
            )
        chosen = _few_best(few, k, width, asked)[reach]
        hit, value = hit[chosen], value[chosen]
        reach, _ = _filled(hit, rows, width)
    if reach.shape[1] == min(k, width) and reach.all():
        mask = reach
        column = hit.reshape(reach.shape) - np.arange(rows)[:, None] * width
    else:
        mask = np.zeros((rows, min(k, width)), dtype=bool)
        mask[:, : reach.shape[1]] = reach
        column = np.full(mask.shape, width - 1, dtype=np.int64)
        column[mask] = hit - np.repeat(np.arange(rows) * width, reach.sum(1))
    if last:
        mask, column = mask[::-1].copy(), column[::-1].copy()
    return torch.from_numpy(column), torch.from_numpy(mask)


@dataclass(frozen=True)
class _Asked:
    """Whom to ask about the scores of few columns of each row.

    Attributes:
        slack: of each row, [rows, 1]; place: of all columns, row by row; first: of each row among them.
        cells: of the matrix; turned: it is walked from its end.
    """

    slack: Floats
    place: Ints
    first: Ints
    cells: int
    turned: bool
    doubt: Doubt

    def exact(self, row: Ints, rank: Ints, width: int) -> NDArray[np.float64]:
        """Of the columns that are so many behind the first of their row; NaN is the best."""
        place = self.place[self.first[row] + rank]
        asked = np.divmod(self.cells - 1 - place if self.turned else place, width)
        exact: NDArray[np.float64] = self.doubt.exact(*(torch.from_numpy(part) for part in asked)).numpy()
        return np.where(np.isnan(exact), np.inf, exact)


def _slack(doubt: Doubt) -> Floats:
    """[rows, 1]."""
    slack: Floats = doubt.slack.nan_to_num(0.0).numpy()[:, None]
    return slack


def _few_best(few: Floats, k: int, width: int, asked: _Asked | None) -> NDArray[np.bool_]:
    """Which are the K best of their row, of more than K columns.

    Rounding could decide where the best one that is not among them is as good as equal to the K-th. There,
    what is above the K-th by more than the slack is one of them for sure, what is below it by more is none.
    """
    order = np.sort(few, axis=1)
    kth, after = np.maximum(order[:, -k, None], _LEAST), order[:, -k - 1, None]
    border = kth if asked is None else kth - asked.slack
    keep: NDArray[np.bool_] = few >= kth
    close = np.flatnonzero((after >= border) & (after > -np.inf))
    if not close.size:
        return keep
    few, kth, border = few[close], kth[close], border[close]
    if asked is None:
        keep[close] = _first_best(few, k)
        return keep
    sure = few > kth + asked.slack[close]
    zone = ~sure & (few >= border) & (few > -np.inf)
    settled = np.where(sure, np.inf, -np.inf)
    row, rank = np.nonzero(zone)
    settled[row, rank] = asked.exact(close[row], rank, width)
    keep[close] = _first_best(settled, k)
    return keep


def _first_best(few: NDArray[Any], k: int) -> NDArray[np.bool_]:
    """Which are the K best of their row; of those equal to the K-th best the first."""
    kth = _kth(few, k)
    above, level = few > kth, few == kth
    kept: NDArray[np.bool_] = above | (level & (level.cumsum(1) <= k - above.sum(1, keepdims=True)))
    return kept


def _filled(hit: Ints, rows: int, width: int) -> tuple[NDArray[np.bool_], Ints]:
    """Ascending flat places in [rows, width] -> [rows, most of a row], each row's first as many as it has;
    and where each row begins among them, [rows]."""
    first = np.searchsorted(hit, np.arange(rows + 1) * width)
    counts = np.diff(first)
    filled: NDArray[np.bool_] = np.arange(counts.max()) < counts[:, None]
    return filled, first[:-1]


def _kth(score: NDArray[Any], k: int) -> Floats:
    """The K-th best of each row, [C, 1]; NaN is the best. More than -inf, which is never kept."""
    if score.shape[1] <= k:
        return np.full((score.shape[0], 1), _LEAST, dtype=np.float32)
    place = score.shape[1] - k
    # Few numbers a row are sorted faster than they are partitioned.
    kth: Floats = np.maximum(np.sort(score, axis=1)[:, place : place + 1], _LEAST)
    return kth
