"""What stands in for operators that a portable model has not got, while a model is exported.

`torch.export` records which operators a forward pass calls, for any sizes and without numbers in the tensors.
So nothing that it records may ask a tensor for a number, or leave torch for numpy. Where an operator has
several forms, the one that holds here is chosen by `is_traced`, and each gives the same bits as the others or
says in which case it does not (property tests).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

# Powers of two by their exponents, as far as vectors and ages need them: a power computed in floating point
# may be off by a rounding in some runtime, and one that is looked up may not.
_LOWEST, _HIGHEST = -1000, 1020
_POWERS = torch.tensor(
    [math.ldexp(1.0, exponent) for exponent in range(_LOWEST, _HIGHEST + 1)], dtype=torch.float64
)


_BY_STANDARD: ContextVar[bool] = ContextVar("ranked by standard", default=False)


def is_traced() -> bool:
    """Whether the model is being exported."""
    return torch.compiler.is_exporting()


def frexp(number: Tensor) -> tuple[Tensor, Tensor]:
    """Positive numbers as significand in [1/2, 1) times a power of two, and the exponent of that power.

    Args:
        number: float64; while a model is exported, from 2 ** -1000 to below 2 ** 1020.
    """
    if is_traced():
        return traced_frexp(number)
    significand, exponent = torch.frexp(number)
    return significand, exponent


def traced_frexp(number: Tensor) -> tuple[Tensor, Tensor]:
    """`frexp` by a logarithm, which is off by one at most, and a comparison that corrects it."""
    exponent = (number.log() * (1 / math.log(2))).floor().to(torch.int64) + 1
    power = _POWERS[exponent - _LOWEST]
    exponent = exponent + (number >= power).to(torch.int64) - (number < 0.5 * power).to(torch.int64)
    return number / _POWERS[exponent - _LOWEST], exponent.to(torch.int32)


@contextmanager
def ranked_by_standard() -> Iterator[None]:
    """Within this context, models are exported for a runtime whose top K keeps the lower of equal columns."""
    before = _BY_STANDARD.set(True)
    try:
        yield
    finally:
        _BY_STANDARD.reset(before)


class SortedRows(NamedTuple):
    """Numbers in their order, and the columns where they were."""

    values: Tensor
    indices: Tensor


def stable_sort(rows_RX: Tensor, descending: bool = False) -> SortedRows:
    """Each row in order; of equal numbers the one at the lower column first.

    ONNX has no sort. The exporter makes one of a TopK of all columns, but not of a sort that is to be stable,
    which ONNX's TopK is.
    """
    if _BY_STANDARD.get():
        return SortedRows(*rows_RX.topk(rows_RX.shape[1], dim=1, largest=descending))
    return SortedRows(*rows_RX.sort(dim=1, descending=descending, stable=True))


def traced_top_columns(score_RX: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The K best columns of each row, ascending, and which of them count; ties go to the lower column.

    ONNX says of its TopK that of equal numbers the one at the lower place comes first. Torch does not say it.
    But the K-th best number is the same in whatever order equal ones are ranked, and it says which columns
    are kept for sure, and which are level with it; of the latter the lowest are kept. So no one has a choice.

    Args:
        score_RX: without NaN; -inf is never kept. X is at least K.
    """
    width = score_RX.shape[1]
    best = score_RX.topk(k, dim=1)
    if _BY_STANDARD.get():
        column = torch.where(best.values > -torch.inf, best.indices, width)
    else:
        kth_R1 = best.values[:, k - 1 :]
        above = (score_RX > kth_R1).to(torch.int64)
        level = ((score_RX == kth_R1) & (score_RX > -torch.inf)).to(torch.int64)
        place = torch.arange(width, device=score_RX.device)
        # All of these numbers are different.
        best = ((2 * above + level) * width + (width - 1 - place)).topk(k, dim=1)
        column = torch.where(best.values >= width, best.indices, width)
    column = column.sort(dim=1).values
    return column.clamp(max=width - 1), column < width
