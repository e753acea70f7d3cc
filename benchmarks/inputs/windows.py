"""Full windows of behaviors, and random vectors to search in them."""

from __future__ import annotations

import torch

from trainer.model.retrieve.score import AttentionVectors
from trainer.model.time import Marks
from trainer.model.windows import Windows


def full_windows(
    windows: int, candidates: int, length: int, width: int, seed: int = 7
) -> tuple[Windows, AttentionVectors]:
    """Windows of `length` behaviors that lie one after the other, with so many candidates each."""
    rng = torch.Generator().manual_seed(seed)
    ends = torch.arange(1, windows + 1) * length
    index = ends[:, None] - 1 - torch.arange(length)
    request = torch.arange(windows).repeat_interleave(candidates)
    mask, zero = torch.ones_like(index, dtype=torch.bool), torch.zeros_like(index)
    lengths = torch.full((windows,), length)
    # The host knows the counts, as it does of batches that were collated.
    counts = (candidates,) * windows
    made = Windows(index, mask, Marks(zero, zero, zero), None, request, lengths, counts)
    query = torch.randn(windows * candidates, width, generator=rng)
    key = torch.randn(windows * length, width, generator=rng)
    return made, AttentionVectors(query, key, torch.zeros_like(request))
