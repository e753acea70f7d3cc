"""Crocodile's loss (arXiv 2405.12706): experts shall not repeat each other, dimension by dimension.

Of O [B, E, d], what E shared experts give for B candidates,

    L = (1 / d^2) sum over p < q of | (O_p - mean)^T (O_q - mean) / (B - 1) |_1

where | |_1 adds up the entries of a d x d matrix. Only pairs of two different experts count: an expert's
covariance with itself is its variance, which shall not vanish. The division by B - 1 is ours; without it the
factor of the loss would depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Covariance:
    """How the loss is taken.

    Attributes:
        factor: of the loss in the total.
        over: `rank`: each rank takes the covariance over its own candidates, and these losses are averaged;
            `step`: over those of all ranks, exactly.
        rows: so many candidates of each rank at most, the first ones; 0 = all.
    """

    factor: float
    over: Literal["rank", "step"] = "rank"
    rows: int = 0

    def value(self, experts_BEd: Tensor, shares: Sequence[int] = (), rank: int = 0) -> Tensor:
        """This rank's part of the loss, scalar: parts and gradients add up over ranks; may be collective.

        Args:
            experts_BEd: this rank's.
            shares: candidates of each rank in this step, 0 where they do not count; empty = one rank.
            rank: this one. Where its own share is 0 its part is of no meaning.
        """
        rows = experts_BEd[: self.rows] if self.rows else experts_BEd
        if self.over == "rank" or len(shares) < 2:
            ranks = max(1, sum(share > 0 for share in shares))
            return _loss(rows, rows.mean(0), rows.shape[0], shared=False) / ranks
        rows = rows[: shares[rank]]
        count = sum(min(share, self.rows or share) for share in shares)
        mean = rows.detach().sum(0)
        dist.all_reduce(mean)
        # The mean need have no gradient: the deviations of all ranks from it add up to nothing.
        return _loss(rows, mean / count, count, shared=True) + experts_BEd.sum() * 0


def covariance_of(model: Any) -> Covariance | None:
    """The loss that a model's settings ask for, None where they ask for none."""
    experts = getattr(model, "experts", None)
    if experts is None or not getattr(experts, "covariance", 0.0):
        return None
    return Covariance(experts.covariance, experts.covariance_over, experts.covariance_rows)


def _loss(rows_BEd: Tensor, mean_Ed: Tensor, count: int, shared: bool) -> Tensor:
    """`count`: B of all ranks where the covariance is `shared`."""
    _, experts, width = rows_BEd.shape
    later = (rows_BEd - mean_Ed).flatten(1)
    if experts < 2:
        return later.sum() * 0
    # Expert p with all that come after it: no pair is computed twice, and none of an expert with itself.
    blocks = []
    for after in range(experts - 1, 0, -1):
        own, later = later.split([width, after * width], dim=1)
        blocks.append((own.T @ later).flatten())
    products = torch.cat(blocks) / max(1, count - 1)
    if not shared:
        return products.abs().sum() / width**2
    whole = products.detach().clone()
    dist.all_reduce(whole)
    # sign(x) x is |x|; with the sign of the sum over ranks the parts of ranks add up to its size.
    return (whole.sign() * products).sum() / width**2
