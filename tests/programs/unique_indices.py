"""FBGEMM's `jagged_unique_indices`, which it has for GPUs alone, written plainly for a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def unique_indices(
    hash_size_cumsum: Tensor, hash_size_offsets: Tensor, offsets: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each id of each table once.

    Args:
        hash_size_cumsum: [T + 1], where each feature's rows begin when all tables stand one behind the other;
            features of one table share its rows.
        hash_size_offsets: [T + 1], where each feature's group of features of one table begins.
        offsets: [T B + 1], where each bag begins; indices: ids of all bags.

    Returns:
        lengths: [T B], how many of the distinct ids each bag is given, as evenly as may be.
        offsets: [T B + 1] of these bags; the distinct ids, feature by feature and ascending; for each of
        `indices` the place of its id among them.
    """
    features, bags = hash_size_cumsum.numel() - 1, offsets.numel() - 1
    stride = bags // features
    of_bag = torch.repeat_interleave(torch.arange(bags), offsets.diff())
    begins = hash_size_cumsum[of_bag // stride]
    linear, place = torch.unique(indices + begins, return_inverse=True)
    distinct = torch.empty_like(linear)
    distinct[place] = indices
    lengths = torch.zeros(bags, dtype=torch.int64)
    for feature in range(features):
        first, last = int(hash_size_offsets[feature]), int(hash_size_offsets[feature + 1])
        low, high = hash_size_cumsum[first], hash_size_cumsum[last]
        count = int(((linear >= low) & (linear < high)).sum())
        shared = (last - first) * stride
        if shared:
            each, more = divmod(count, shared)
            lengths[first * stride : last * stride] = each + (torch.arange(shared) < more)
    return lengths, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), distinct, place


@contextmanager
def unique_indices_on_cpu() -> Iterator[list[int]]:
    """While this lasts, FBGEMM's operator takes tensors of a CPU; the list gets the ids of each call."""
    calls: list[int] = []

    def counted(*given: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        calls.append(given[-1].numel())
        return unique_indices(*given)

    library = torch.library.Library("fbgemm", "IMPL")
    library.impl("jagged_unique_indices", counted, "CPU")
    yield calls
    library._destroy()
