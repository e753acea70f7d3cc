"""How many of the behaviors that one search keeps another one keeps, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trainer.model.settings import ModelConfig
from trainer.model.windows import Selection

# Of what the search keeps by the raw weights, averaged ones must keep so much to be served.
LEAST_OVERLAP = 0.95


class Overlap:
    """Counts over many batches, branch by branch.

    Searches that do not go by scores keep the same behaviors whatever the weights are, and are left out.

    Args:
        model: whose searches are compared.
    """

    def __init__(self, model: ModelConfig) -> None:
        branches = model.all_branches().items()
        # Branch -> behaviors that both keep, and that the first one keeps.
        self.counts = {name: [0, 0] for name, branch in branches if branch.search_kind.by_score}

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, first: Mapping[str, Selection], second: Mapping[str, Selection]) -> None:
        """Of the same batch."""
        for name, count in self.counts.items():
            pairs = _pairs(first[name])
            count[0] += int(torch.isin(_pairs(second[name]), pairs).sum())
            count[1] += pairs.numel()

    def shares(self) -> dict[str, float]:
        """Branch -> of what the first keeps, the part that the second keeps, too."""
        return {name: both / max(all_, 1) for name, (both, all_) in self.counts.items()}


def overlap_lines(shares: Mapping[str, float], size: str) -> list[str]:
    """A line for each branch; `size`: what was compared."""
    return [
        f"averaged weights: the search of {name} keeps {share:.2%} of the top K of the raw ones ({size})"
        for name, share in shares.items()
    ]


def too_small(shares: Mapping[str, float]) -> Sequence[str]:
    """Branches whose averaged weights are not to be served."""
    return [name for name, share in shares.items() if share < LEAST_OVERLAP]


def _pairs(kept: Selection) -> Tensor:
    """The kept behaviors as numbers that no two pairs of candidate and behavior share."""
    candidate = torch.arange(kept.index.shape[0], device=kept.index.device)[:, None]
    pairs: Tensor = (candidate * (1 << 32) + kept.index)[kept.mask]
    return pairs.cpu()
