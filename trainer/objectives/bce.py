"""The loss of a step, exact over ranks of unequal size."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def loss_sum(logits_CT: Tensor, labels_CT: Tensor, weight_C: Tensor) -> Tensor:
    """Binary cross entropy summed over candidates with their weights, averaged over tasks: a scalar."""
    return (
        F.binary_cross_entropy_with_logits(logits_CT, labels_CT, weight_C[:, None], reduction="sum")
        / (labels_CT.shape[1])
    )


def rank_loss(total: Tensor, step_candidates: int, world_size: int, counted: bool) -> Tensor:
    """What a rank calls backward on.

    DistributedDataParallel and TorchRec average gradients over ranks; scaling the rank's sum by
    world_size / (candidates of the whole step) makes that average the gradient of the global mean.
    """
    return total * (world_size / step_candidates if counted else 0.0)
