"""What the losses of a step exchange between ranks: sums, and candidates of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor


class Sums:
    """Numbers without gradient that all ranks add up, in one exchange for all of them.

    Args:
        shared: there are other ranks; counted: this rank's part of the step counts, else it adds nothing.
    """

    def __init__(self, shared: bool, counted: bool) -> None:
        self._shared, self._counted, self._parts = shared, counted, list[Tensor]()

    def put(self, part: Tensor) -> Callable[[], Tensor]:
        """-> what gives the sum of this part over ranks, of its shape and type, once all was exchanged."""
        place = len(self._parts)
        self._parts.append(part.detach() if self._counted else torch.zeros_like(part))
        return lambda: self._parts[place]

    def exchange(self) -> None:
        """Collective where something was put in and there are other ranks."""
        if not (self._shared and self._parts):
            return
        total = torch.cat([part.double().flatten() for part in self._parts])
        dist.all_reduce(total)
        sums = total.split([part.numel() for part in self._parts])
        self._parts = [
            each.to(part.dtype).view_as(part) for each, part in zip(sums, self._parts, strict=True)
        ]


def sum_on_hosts(counts: Sequence[int]) -> list[int]:
    """Sum over ranks of equally many counts that every host knows; no device is waited for."""
    total = torch.tensor(counts, dtype=torch.int64)
    dist.all_reduce(total)
    summed: list[int] = total.tolist()
    return summed


def on_all_hosts(counts: Sequence[int], ranks: int) -> list[list[int]]:
    """Equally many counts of each rank, in the order of ranks, that every host knows of itself; collective.

    No device is waited for.
    """
    own = torch.tensor(counts, dtype=torch.int64)
    parts = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(parts, own)
    return [part.tolist() for part in parts]


def of_all_ranks(own: Tensor, shares: Sequence[int], rank: int) -> tuple[Tensor, slice]:
    """The rows [n_r, ...] of all ranks in their order, and where those of this rank are; collective.

    Those of this rank keep their graph, those of others have none.

    Args:
        own: [n, ...]; only the first shares[rank] of them take part.
        shares: n_r; rank: this one.
    """
    mine = own[: shares[rank]]
    padded = own.new_zeros(max(shares), *own.shape[1:])
    padded[: mine.shape[0]] = mine.detach()
    parts = [torch.empty_like(padded) for _ in shares]
    dist.all_gather(parts, padded)
    rows = [part[:share] for part, share in zip(parts, shares, strict=True)]
    rows[rank] = mine
    first = [0, *accumulate(shares)][rank]
    return torch.cat(rows), slice(first, first + mine.shape[0])
