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
        choices: only candidates count that have K kept behaviors. Who has fewer keeps them all by whatever
            weights.
    """

    def __init__(self, model: ModelConfig, choices: bool = False) -> None:
        self._choices, branches = choices, model.all_branches().items()
        # Branch -> behaviors that both keep, and that the first one keeps.
        self.counts = {name: [0, 0] for name, branch in branches if branch.search_kind.by_score}

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, first: Mapping[str, Selection], second: Mapping[str, Selection]) -> None:
        """Of the same batch."""
        for name, count in self.counts.items():
            counted = first[name].mask.all(1) if self._choices else first[name].mask.any(1)
            pairs = _pairs(first[name], counted)
            count[0] += int(torch.isin(_pairs(second[name], counted), pairs).sum())
            count[1] += pairs.numel()

    def shares(self) -> dict[str, float]:
        """Branch -> of what the first keeps, the part that the second keeps, too; all of nothing is all."""
        return {name: both / all_ if all_ else 1.0 for name, (both, all_) in self.counts.items()}

    def lines(self, size: str) -> list[str]:
        """A line for each branch, of raw and averaged weights; `size`: what was compared."""
        return [
            f"averaged weights: the search of {name} keeps {share:.2%} of the top K of the raw ones ({size})"
            if self.counts[name][1]
            else f"averaged weights: no candidate has K behaviors for the search of {name} to choose ({size})"
            for name, share in self.shares().items()
        ]


def too_small(shares: Mapping[str, float]) -> Sequence[str]:
    """Branches whose averaged weights are not to be served."""
    return [name for name, share in shares.items() if share < LEAST_OVERLAP]


def _pairs(kept: Selection, counted: Tensor) -> Tensor:
    """The kept behaviors of the candidates that count, as numbers, one for each candidate and behavior."""
    candidate = torch.arange(kept.index.shape[0], device=kept.index.device)[:, None]
    pairs: Tensor = (candidate * (1 << 32) + kept.index)[kept.mask & counted[:, None]]
    return pairs.cpu()
