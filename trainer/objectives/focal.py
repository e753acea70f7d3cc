"""The focal loss of Lin et al. (2020) with a shift, as released with "Understanding the Ranking Loss" (2024).

A positive counts (1 - p)^gamma, which is textbook. A negative counts p^gamma + 1 - m, where m is the mean of
p^gamma over all negatives of the step: negatives keep the mean weight 1, so that their losses do not vanish
together where positives are rare. m is a part of the graph, as in the released code. A label between 0 and 1
is a positive by that share.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.objectives.losses import Points


def focal(given: Points) -> Tensor:
    """Focal loss: candidates that the model is sure of count less, negatives keep the mean weight 1."""
    assert given.sums is not None
    powers, negatives, losses = given.sums.unbind(1)
    some = torch.where(negatives > 0, negatives, 1.0)
    power, loss, weight = _negatives(given)
    positive = (given.gamma * F.logsigmoid(-given.logits)).exp() * F.softplus(-given.logits)
    # The last term is 0. Its gradient is that of -m in the losses of all ranks' negatives, which is complete
    # on no rank alone: each adds what comes from its own p.
    through_mean = losses / some * (power - power.detach())
    negative = (power + 1 - powers / some) * loss - through_mean
    return given.weight * given.labels * positive + weight * negative


def negative_sums(given: Points) -> Tensor:
    """Of the negatives: p^gamma, 1 and the binary cross entropy, all times their weights: [C, 3, T]."""
    power, loss, weight = _negatives(given)
    return torch.stack([weight * power, weight.expand_as(power), weight * loss], dim=1)


def _negatives(given: Points) -> tuple[Tensor, Tensor, Tensor]:
    """p^gamma, binary cross entropy and weight of every candidate as a negative, each [C, T]."""
    # In logarithms the gradient stays finite however sure the model is.
    power = (given.gamma * F.logsigmoid(given.logits)).exp()
    return power, F.softplus(given.logits), given.weight * (1 - given.labels)
