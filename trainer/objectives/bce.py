"""Binary cross entropy of every candidate and task."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from trainer.objectives.losses import pointwise


@pointwise
def bce(logits_CT: Tensor, labels_CT: Tensor, weight_CT: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits_CT, labels_CT, weight_CT, reduction="none")
