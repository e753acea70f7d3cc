"""Combined-List of "Understanding the Ranking Loss" (2024): each positive against all of its group."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.objectives.ranking import Compared


def list_loss(given: Compared) -> Tensor:
    """Softmax cross entropy of each positive among all candidates."""
    return among_all(given, given.logits)


def positives(given: Compared) -> Tensor:
    """A loss for each positive."""
    return given.own_sums((given.positive & given.mixed).double())


def among_all(given: Compared, logits: Tensor) -> Tensor:
    """-log(e^z_i / sum_k w_k e^z_k) of every positive i, k over its group: [groups]."""
    losses = given.logsumexp(logits) - logits
    return given.own_sums(torch.where(given.positive & given.mixed, given.weight * losses, 0.0))
