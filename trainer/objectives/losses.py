"""What an objective is, and the losses of a batch by one.

A label that is NaN was not observed: its candidate has no loss, no gradient and no part in the count of that
task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits [C, T], labels [C, T] and weights [C, T] or [C, 1] -> weighted losses [X, T] to add up by task.

There is one row a candidate where an objective looks at candidates one by one. Where a label was not
observed, an objective is given the label 0 with the weight 0.
"""


@dataclass(frozen=True)
class Losses:
    """The losses of one rank's part of a step.

    Attributes:
        terms_XT: of an objective; labels_CT: NaN where not observed.
    """

    terms_XT: Tensor
    labels_CT: Tensor

    def total(self) -> Tensor:
        """The mean over tasks of their sums, scalar."""
        return self.terms_XT.sum() / self.terms_XT.shape[1]

    def sums(self, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Task -> the sum of its losses, scalar."""
        return dict(zip(tasks, self.terms_XT.sum(0).unbind(), strict=True))

    def counts(self, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Task -> how many candidates have a label, scalar."""
        return dict(zip(tasks, (~self.labels_CT.isnan()).sum(0).unbind(), strict=True))


def losses_of(
    objective: Objective, logits_CT: Tensor, labels_CT: Tensor, weight_C: Tensor, labelled: bool = False
) -> Losses:
    """The losses of a batch, in the order of its tasks.

    Args:
        labelled: no label is NaN, as the host knows of most batches; then the device need not look.
    """
    labels, weight = labels_CT, weight_C[:, None]
    if not labelled:
        weight = weight * ~labels.isnan()
        labels = labels.nan_to_num(0.0, torch.inf, -torch.inf)
    return Losses(objective(logits_CT, labels, weight), labels_CT)


def rank_loss(total: Tensor, step_candidates: int, world_size: int, counted: bool) -> Tensor:
    """What a rank calls backward on.

    DistributedDataParallel and TorchRec average gradients over ranks; scaling the rank's sum by
    world_size / (candidates of the whole step) makes that average the gradient of the global mean.
    """
    return total * (world_size / step_candidates if counted else 0.0)
