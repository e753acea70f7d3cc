"""RankNet over all pairs of a positive and a negative of a group, without a tensor of all pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trainer.objectives.ranking import Compared

# Pairs that are looked at together: bounds the memory, whatever the number of candidates.
_CHUNK = 1 << 20


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
        positive, negative, own = given.positive, given.negative, given.own
        whole = own == slice(0, logits_N.numel())
        mine = torch.zeros_like(positive)
        mine[own] = True
        value_N, gradient_N = torch.zeros_like(logits_N), torch.zeros_like(logits_N)
        # A pair's value is of the rank that has its positive. Its gradient is needed on both.
        _add_pairs(given, logits_N, (positive & mine, negative), value_N, gradient_N)
        if not whole:
            _add_pairs(given, logits_N, (positive & ~mine, negative & mine), None, gradient_N)
        ctx.save_for_backward(gradient_N * mine)
        ctx.group = given.group
        return given.by_group(value_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_groups: Tensor) -> tuple[Tensor, None]:
        (gradient_N,) = ctx.saved_tensors
        return gradient_N * (of_groups if ctx.group is None else of_groups[ctx.group]), None


def _compresses(logits_N: Tensor) -> bool:
    """Whether only pairs are looked at. A GPU looks at all, and ignores those that are none.

    Only the device knows how many there are, and the host would have to wait for it.
    """
    return logits_N.device.type == "cpu"


def _add_pairs(
    given: Compared,
    logits_N: Tensor,
    sides: tuple[Tensor, Tensor],
    value_N: Tensor | None,
    gradient_N: Tensor,
) -> None:
    """Add values, at the place of the positive, and gradients of the pairs of some positives and negatives.

    `sides`: which they are, bool [N].
    """
    if _compresses(logits_N):
        row_P, column_Q = (side.nonzero()[:, 0] for side in sides)
    else:
        row_P = column_Q = torch.arange(logits_N.numel(), device=logits_N.device)
    if not column_Q.numel():
        return
    weight_P, weight_Q = (
        (given.weight * side)[at] for side, at in zip(sides, (row_P, column_Q), strict=True)
    )
    rows = max(1, _CHUNK // column_Q.numel())
    for row, of_row in zip(row_P.split(rows), weight_P.split(rows), strict=True):
        weight = of_row[:, None] * weight_Q
        if given.group is not None:
            weight = weight * (given.group[row, None] == given.group[column_Q])
        behind = logits_N[column_Q] - logits_N[row, None]
        slope = weight * behind.sigmoid()
        if value_N is not None:
            value_N.index_add_(0, row, (weight * F.softplus(behind)).sum(1))
        gradient_N.index_add_(0, row, -slope.sum(1))
        gradient_N.index_add_(0, column_Q, slope.sum(0))
