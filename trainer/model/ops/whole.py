"""Inner products that are exact in any order of adding up, on every device: of vectors as whole numbers.

A sum of products of whole numbers is exact in double precision as long as it stays below 2 ** 53. Vectors are
rounded to so many bits below their own largest element that it does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.model.ops.traced import frexp

# Bits of a double's significand.
_BITS = 53
# Less than any product of two float32 but 0.
_SMALLEST = 2.0**-900
# Twice the relative error of one rounding to float32: bounds that are made of it also cover the rounding to
# whole numbers. They hold for products of float32 that are rounded to float32, not to TF32.
ROUNDING = 2.0**-23
# Numbers of pairs' vectors that are held at once: 32 MB.
CELLS = 1 << 22


@dataclass(frozen=True)
class Rows:
    """Some rows of a matrix as whole numbers.

    Attributes:
        whole: [R, D], rounded; unit: [R, 1], the power of two that a row is a multiple of.
        place: int64 [M], which of the rows.
    """

    whole: Tensor
    unit: Tensor
    place: Tensor

    @staticmethod
    def of(rows_RD: Tensor, place_M: Tensor) -> Rows:
        return Rows(*whole_rows(rows_RD), place_M)

    def times(self, other: Rows) -> Tensor:
        """Inner products of the M pairs, exact for the rounded rows."""
        width = self.whole.shape[1]
        step = max(1, CELLS // max(1, width))
        parts = []
        for mine, its in zip(self.place.split(step), other.place.split(step), strict=True):
            sums = torch.einsum("md,md->m", self.whole[mine], other.whole[its])
            parts.append(sums * self.unit[mine, 0] * other.unit[its, 0])
        return torch.cat(parts) if parts else self.whole.new_zeros(0)


def whole_rows(rows_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of float64 as whole numbers, and the power of two that each must be multiplied with."""
    if not rows_RD.shape[1]:
        return rows_RD, rows_RD.new_ones(rows_RD.shape[0], 1)
    bits = (_BITS - math.ceil(math.log2(rows_RD.shape[1]))) // 2
    # Rows of zeros are a multiple of any power.
    largest = rows_RD.abs().amax(1, keepdim=True).clamp(min=_SMALLEST)
    # The quotient of a number and its significand is a power of two, without any rounding.
    unit = largest / frexp(largest)[0] * 2.0**-bits
    return (rows_RD / unit).round(), unit


def needed_places(place_M: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """-> the different places, ascending [R], and where each of the M is among them."""
    touched = torch.zeros(rows, dtype=torch.bool, device=place_M.device)
    touched[place_M] = True
    return torch.nonzero(touched).squeeze(1), (torch.cumsum(touched, 0) - 1)[place_M]
