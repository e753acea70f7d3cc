"""RankNet over all pairs of a positive and a negative of a group, without a tensor of all pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trainer.objectives.ranking import Compared

# Pairs that are looked at together: bounds the memory, whatever the number of candidates.
_CHUNK = 1 << 20
# The same of positives, where only those of one group are compared.
_ROWS = 32


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
        own, every = given.own, slice(0, logits_N.numel())
        value_N, gradient_N = torch.zeros_like(logits_N), torch.zeros_like(logits_N)
        # A pair's value is of the rank that has its positive. Its gradient is needed on both.
        _add_pairs(given, logits_N, (own, every), value_N, gradient_N)
        for others in (slice(0, own.start), slice(own.stop, every.stop)) if own != every else ():
            _add_pairs(given, logits_N, (others, own), None, gradient_N)
        mine = torch.zeros_like(gradient_N)
        mine[own] = gradient_N[own]
        ctx.save_for_backward(mine)
        ctx.group = given.group
        return given.by_group(value_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_groups: Tensor) -> tuple[Tensor, None]:
        (gradient_N,) = ctx.saved_tensors
        return gradient_N * (of_groups if ctx.group is None else of_groups[ctx.group]), None


def _compresses(numbers: Tensor) -> bool:
    """Whether only pairs are looked at. A GPU looks at all, and ignores those that are none.

    Only the device knows how many there are, and the host would have to wait for it.
    """
    return numbers.device.type == "cpu"


def _add_pairs(
    given: Compared,
    logits_N: Tensor,
    sides: tuple[slice, slice],
    value_N: Tensor | None,
    gradient_N: Tensor,
) -> None:
    """Add values, at the place of the positive, and gradients of the pairs of some positives and negatives.

    `sides`: the candidates among which they are.
    """
    positive_N, negative_N = (given.weight * side for side in (given.positive, given.negative))
    for row, column in _blocks(given, sides):
        weight = positive_N[row, None] * negative_N[column]
        if given.group is not None:
            weight = weight * (given.group[row, None] == given.group[column])
        behind = logits_N[column] - logits_N[row, None]
        slope = weight * behind.sigmoid()
        if value_N is not None:
            value_N.index_add_(0, row, (weight * F.softplus(behind)).sum(1))
        gradient_N.index_add_(0, row, -slope.sum(1))
        gradient_N.index_add_(0, column, slope.sum(0))


def _blocks(given: Compared, sides: tuple[slice, slice]) -> Iterator[tuple[Tensor, Tensor]]:
    """Places of candidates, two lists at a time: pairs of the two lists are all pairs there are, and more."""
    every_N, group = torch.arange(given.labels.numel(), device=given.labels.device), given.group
    row_P, column_Q = (every_N[side] for side in sides)
    compresses = _compresses(given.labels)
    if compresses:
        row_P, column_Q = row_P[given.positive[row_P]], column_Q[given.negative[column_Q]]
    if not (row_P.numel() and column_Q.numel()):
        return
    rows = max(1, _CHUNK // column_Q.numel())
    if group is None or not compresses:
        for row in row_P.split(rows):
            yield row, column_Q
        return
    # In the order of groups a few positives meet few negatives that are not of their groups.
    row_P, column_Q = (at[group[at].argsort(stable=True)] for at in (row_P, column_Q))
    of_column = group[column_Q]
    for row in row_P.split(min(rows, _ROWS)):
        start = torch.searchsorted(of_column, group[row[0]])
        end = torch.searchsorted(of_column, group[row[-1]], right=True)
        if start < end:
            yield row, column_Q[int(start) : int(end)]
