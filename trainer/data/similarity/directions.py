"""Directions of vectors as small integers, so that cosines have the same bits whoever computes them.

A product of two matrices of floats adds up in an order that follows from their shapes, from the processor and
from the number of threads, so that its last bits do, too. A number that is quantised right after would then
now and then fall into the next step: in training another one than in serving. Here each vector is divided by
its length and rounded to integers q with

    |q_i| <= 2^12  and  sum_i q_i^2 <= 2^24.

By the inequality of Cauchy and Schwarz the sum of any part of the products q_i r_i of two such vectors is an
integer of at most 2^24. float32 has every one of these, so each step of a product of matrices in float32 is
exact, in any order, fused or not. What is left are the two lengths, one for each vector, and elementwise
operations of float64, which IEEE 754 defines.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

Reals = npt.NDArray[np.float64]
Directions = npt.NDArray[np.int16]
LENGTH: Final = 1 << 12
"""The longest direction, in the sense of Euclid."""
UNITS: Final = 1 << 20
"""A cosine is an integer number of parts of this size."""
MOST_DIM: Final = 1 << 16


def directions_of(vectors: npt.NDArray[np.floating]) -> Directions:
    """The directions [n, dim] of finite vectors [n, dim]; zeros for a vector of zeros.

    All steps are elementwise, so that the bits do not depend on how many vectors there are.
    """
    columns = np.ascontiguousarray(np.asarray(vectors, dtype=np.float64).T)
    dim, count = columns.shape
    largest = np.abs(columns).max(axis=0, initial=0.0)
    given = largest > 0
    # So that no square is too large or too small.
    columns = columns / np.where(given, largest, 1.0)
    squares = np.zeros(count)
    for column in columns:
        squares += column * column
    # Rounding moves each number by a half at most, and so the vector by sqrt(dim) / 2.
    longest = LENGTH - math.ceil(math.sqrt(dim) / 2)
    scaled = np.rint(columns / np.where(given, np.sqrt(squares), 1.0) * longest)
    return np.ascontiguousarray(scaled.T.astype(np.int16))


def weights_of(directions: npt.NDArray[np.floating]) -> Reals:
    """sqrt(UNITS) / |q| of each direction [n, dim], which is none of zeros: [n].

    Args:
        directions: as float32 or float64.
    """
    squares = np.einsum("nd,nd->n", directions, directions).astype(np.float64)
    return np.asarray(math.sqrt(UNITS) / np.sqrt(squares))


def cosines(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> Reals:
    """The cosine of each pair of directions [m, dim] and [n, dim] in parts of `UNITS`: integers, [m, n].

    Args:
        left, right: directions as float32, none of zeros.
    """
    return rounded((left @ right.T).astype(np.float64), weights_of(left)[:, None], weights_of(right))


def cosines_of_pairs(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> Reals:
    """The same of the first with the first, the second with the second, and so on: [n]."""
    products = np.einsum("nd,nd->n", left, right).astype(np.float64)
    return rounded(products, weights_of(left), weights_of(right))


def rounded(products: Reals, left: Reals, right: Reals) -> Reals:
    """Products of directions times both weights, rounded to integers; `products` is overwritten."""
    products *= left
    products *= right
    products += 0.5
    return np.floor(products, out=products)
