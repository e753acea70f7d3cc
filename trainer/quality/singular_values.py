"""Singular values of a matrix that is seen a band of rows at a time, and how many of them matter.

The bands go through QR factorisations one after another (TSQR, Demmel et al. 2012): what is kept of all rows
so far is one triangle R [K, K] in float64, whose singular values are those of the rows. Unlike E^T E, it does
not square them, so that small ones stay exact next to large ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Doubles = npt.NDArray[np.float64]
# Rows of a QR factorisation: so few that they stay in a core's cache.
_ROWS = 4096


class SingularValues:
    """Takes the rows of a matrix of K columns, and gives its singular values.

    Rows that hold NaN or infinity have none: they are left out and counted.

    Attributes:
        rows: taken; broken: left out.
    """

    def __init__(self, width: int) -> None:
        self.rows, self.broken = 0, 0
        self._triangle = torch.zeros(0, width, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take rows [n, K] of any float type."""
        for part in rows.detach().split(_ROWS):
            finite = part.isfinite().all(1)
            some = part if bool(finite.all()) else part[finite]
            self.rows += len(some)
            self.broken += len(part) - len(some)
            self._fold(some.double())

    def merge(self, triangles: Sequence[Tensor]) -> None:
        """Take what `triangle` is of other rows; counts stay."""
        for triangle in triangles:
            self._fold(triangle)

    @property
    def triangle(self) -> Tensor:
        """Float64 [at most K, K]: it has the singular values of the rows so far."""
        return self._triangle

    def values(self) -> Doubles:
        """The min(rows, K) singular values, descending."""
        found: Doubles = torch.linalg.svdvals(self._triangle).cpu().numpy()
        return found

    def _fold(self, rows: Tensor) -> None:
        if len(rows):
            stacked = torch.cat([self._triangle.to(rows.device), rows])
            self._triangle = torch.linalg.qr(stacked, mode="r").R


def abundance(values: Doubles) -> float:
    """Information abundance: the sum of the singular values by the largest (Multi-Embedding, section 3).

    Between 1 and their number; 0 where all are zero, or there is none.
    """
    largest = float(values.max(initial=0.0))
    return float(values.sum()) / largest if largest > 0 else 0.0


def rank_me(values: Doubles) -> float:
    """RankMe: exp of the entropy of the singular values by their sum (Garrido et al. 2023, equation 1).

    Between 1 and their number; 0 where all are zero, or there is none.
    """
    share = values / values.sum() if values.any() else values
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum())) if share.size else 0.0
