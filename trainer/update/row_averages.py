"""The exact average of rows of which each step changes few, without a look at the others.

A row stays as it is between two changes, so all steps between them are added at once, with the sum of their
weights, when it changes again. This takes one more row and one number of memory for each row, and the rows
as they were before each change. Training has no use for it yet: a phase averages dense weights alone, and
this is what it would take to average tables with them.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RowAverages:
    """sum_k a_k w_k / sum_k a_k over steps k = 0, 1, ... of every row of a table.

    Args:
        rows, width: of the table.
    """

    def __init__(self, rows: int, width: int) -> None:
        self._sums = torch.zeros(rows, width, dtype=torch.float64)
        # Of each row, the sum of the weights of all steps that `_sums` knows of.
        self._known = torch.zeros(rows, dtype=torch.float64)
        self._total = 0.0

    def add(self, weight: float, changed: Tensor, before: Tensor) -> None:
        """A step of weight a_k; step 0 is the table at the start, which changes nothing.

        Args:
            changed: int64 [n], ids of rows that the step has changed, each once; before: [n, D], what they
                were before it.
        """
        share = self._total - self._known[changed]
        self._sums[changed] += share[:, None] * before.double()
        self._known[changed] = self._total
        self._total += weight

    def averages(self, ids: Tensor, now: Tensor) -> Tensor:
        """float64 [n, D] of rows [n, D] as they are now."""
        share = self._total - self._known[ids]
        return (self._sums[ids] + share[:, None] * now.double()) / self._total
