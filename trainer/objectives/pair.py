"""RankNet over all pairs of a positive and a negative of a group, without a tensor of all pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trainer.objectives.ranking import Compared

# Pairs that are looked at together: bounds the memory, whatever the number of candidates. On a GPU, where a
# kernel must start for each operation of each chunk, more of them.
_CHUNK, _CHUNK_ON_DEVICE = 1 << 20, 1 << 22
# On a CPU, so many positives at most, where only those of one group are compared.
_ROWS = 32


class _Sides(NamedTuple):
    """Where positives and negatives are that are compared; `counts`: of them, where the host may not look."""

    rows: slice
    columns: slice
    counts: tuple[int, int] | None


def pair(given: Compared) -> Tensor:
    """Every positive against every negative: -log sigmoid of the difference of their logits (RankNet)."""
    values: Tensor = _Pairs.apply(given.logits, given)  # type: ignore[no-untyped-call]
    return values


def pairs(given: Compared) -> Tensor:
    """A loss for each pair."""
    of_positive = given.of_group(given.by_group(given.negative)) * given.positive
    return given.own_sums(of_positive)


class _Pairs(torch.autograd.Function):
    """Sums of w_i w_j softplus(z_j - z_i) by group. The gradients are computed in the same pass."""

    @staticmethod
    def forward(ctx: Any, logits_N: Tensor, given: Compared) -> Tensor:
        value_N, gradient_N = torch.zeros_like(logits_N), torch.zeros_like(logits_N)
        # A pair's value is of the rank that has its positive. Its gradient is needed on both.
        own, *others = _sides(given)
        _add_pairs(given, logits_N, own, value_N, gradient_N)
        for sides in others:
            _add_pairs(given, logits_N, sides, None, gradient_N)
        mine = torch.zeros_like(gradient_N)
        mine[given.own] = gradient_N[given.own]
        ctx.save_for_backward(mine)
        ctx.group = given.group
        return given.by_group(value_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_groups: Tensor) -> tuple[Tensor, None]:
        (gradient_N,) = ctx.saved_tensors
        return gradient_N * (of_groups if ctx.group is None else of_groups[ctx.group]), None


def _sides(given: Compared) -> Iterator[_Sides]:
    """Positives of this rank and all negatives; then those of ranks before and after, and its negatives."""
    own, every, counts = given.own, slice(0, given.labels.numel()), given.counts
    if counts is None:
        of_sides: Sequence[tuple[int, int] | None] = [None] * 3
    else:
        before, mine, after = counts.positives
        negatives = counts.negatives[1]
        of_sides = [(mine, sum(counts.negatives)), (before, negatives), (after, negatives)]
    yield _Sides(own, every, of_sides[0])
    if own != every:
        yield _Sides(slice(0, own.start), own, of_sides[1])
        yield _Sides(slice(own.stop, every.stop), own, of_sides[2])


def _add_pairs(
    given: Compared, logits_N: Tensor, sides: _Sides, value_N: Tensor | None, gradient_N: Tensor
) -> None:
    """Add values, at the place of the positive, and gradients of the pairs of these two sides."""
    positive_N, negative_N = (given.weight * side for side in (given.positive, given.negative))
    for row, column in _counted(given, sides) if sides.counts else _looked_for(given, sides):
        weight = positive_N[row] * negative_N[column]
        if given.group is not None:
            weight = weight * (given.group[row] == given.group[column])
        behind = logits_N[column] - logits_N[row]
        slope = weight * behind.sigmoid()
        if value_N is not None:
            _add(value_N, row, weight * F.softplus(behind))
        _add(gradient_N, row, -slope)
        _add(gradient_N, column, slope)


def _add(sums_N: Tensor, place: Tensor, numbers: Tensor) -> None:
    """Add numbers of pairs at the places of one side: as many, or each with all of the other side."""
    sums_N.index_add_(0, place.flatten(), numbers.sum_to_size(place.shape).flatten())


# Each of these gives places of positives and of negatives, [P, 1] and [1, Q] or both [n]: with each other all
# pairs there are, and pairs of two groups besides.


def _looked_for(given: Compared, sides: _Sides) -> Iterator[tuple[Tensor, Tensor]]:
    every_N, group = torch.arange(given.labels.numel(), device=given.labels.device), given.group
    row_P, column_Q = every_N[sides.rows], every_N[sides.columns]
    row_P, column_Q = row_P[given.positive[row_P]], column_Q[given.negative[column_Q]]
    if not (row_P.numel() and column_Q.numel()):
        return
    rows = max(1, _CHUNK // column_Q.numel())
    if group is None:
        for row in row_P.split(rows):
            yield row[:, None], column_Q[None]
        return
    # In the order of groups a few positives meet few negatives that are not of their groups.
    row_P, column_Q = (at[group[at].argsort(stable=True)] for at in (row_P, column_Q))
    of_column = group[column_Q]
    for row in row_P.split(min(rows, _ROWS)):
        start = torch.searchsorted(of_column, group[row[0]])
        end = torch.searchsorted(of_column, group[row[-1]], right=True)
        if start < end:
            yield row[:, None], column_Q[None, int(start) : int(end)]


def _counted(given: Compared, sides: _Sides) -> Iterator[tuple[Tensor, Tensor]]:
    """By the counts that the host knows: nothing waits for the device."""
    assert given.counts is not None and sides.counts is not None
    positives, negatives = sides.counts
    row_P = _places(given.positive, sides.rows, positives)
    column_Q = _places(given.negative, sides.columns, negatives)
    if not (positives and negatives):
        return
    if given.counts.pairs is not None and given.group is not None:
        yield from _within_requests(given.group, given.groups, row_P, column_Q, given.counts.pairs)
        return
    for row in row_P.split(max(1, _CHUNK_ON_DEVICE // negatives)):
        yield row[:, None], column_Q[None]


def _places(there_N: Tensor, side: slice, count: int) -> Tensor:
    """[count], where a mask is true within a slice, ascending."""
    place: Tensor = there_N[side].argsort(descending=True, stable=True)[:count] + side.start
    return place


def _within_requests(
    group_N: Tensor, groups: int, row_P: Tensor, column_Q: Tensor, pairs: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs of one group, as lists; candidates lie in the order of their groups."""
    group_P = group_N[row_P]
    # Negatives of each group, and those of the groups before it.
    held_G = torch.zeros(groups, dtype=torch.int64, device=group_N.device)
    held_G.index_add_(0, group_N[column_Q], torch.ones_like(column_Q))
    first_G = held_G.cumsum(0) - held_G
    # Pairs of each positive lie after those of the ones before it.
    end_P = held_G[group_P].cumsum(0)
    first_P = first_G[group_P] - (end_P - held_G[group_P])
    for start in range(0, pairs, _CHUNK_ON_DEVICE):
        pair = torch.arange(start, min(pairs, start + _CHUNK_ON_DEVICE), device=group_N.device)
        place = torch.searchsorted(end_P, pair, right=True)
        yield row_P[place], column_Q[first_P[place] + pair]
