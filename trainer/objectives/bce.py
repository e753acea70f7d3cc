"""Binary cross entropy of every candidate and task."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from trainer.objectives.losses import Points, observed


def bce(given: Points) -> Tensor:
    """Binary cross entropy."""
    return F.binary_cross_entropy_with_logits(given.logits, given.labels, given.weight, reduction="none")


def loss_sum(logits_CT: Tensor, labels_CT: Tensor, weight_C: Tensor) -> Tensor:
    """Summed over candidates with their weights, averaged over tasks: a scalar."""
    labels, weight, _ = observed(labels_CT, weight_C[:, None])
    return bce(Points(logits_CT, labels, weight)).sum() / labels_CT.shape[1]
