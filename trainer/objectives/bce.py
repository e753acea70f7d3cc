"""Binary cross entropy of every candidate and task."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from trainer.objectives.losses import losses_of


def bce(logits_CT: Tensor, labels_CT: Tensor, weight_CT: Tensor) -> Tensor:
    """Binary cross entropy."""
    return F.binary_cross_entropy_with_logits(logits_CT, labels_CT, weight_CT, reduction="none")


def loss_sum(logits_CT: Tensor, labels_CT: Tensor, weight_C: Tensor) -> Tensor:
    """Summed over candidates with their weights, averaged over tasks: a scalar."""
    return losses_of(bce, logits_CT, labels_CT, weight_C).total()
