"""What an objective is, and what it returns.

An objective turns the logits of a rank's candidates into the losses of every task. A label that is NaN was
not observed: its candidate has no loss, no gradient and no part in the count of that task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps

import torch
from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """The losses of one rank's part of a step.

    Attributes:
        terms_XT: what is added up for each of T tasks, weighted; one a candidate where an objective looks at
            candidates one by one.
        observed_CT: bool, which labels there are.
    """

    terms_XT: Tensor
    observed_CT: Tensor

    def total(self) -> Tensor:
        """The mean over tasks of their sums, scalar."""
        return self.terms_XT.sum() / self.terms_XT.shape[1]

    def sums(self, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Task -> the sum of its losses, scalar."""
        return dict(zip(tasks, self.terms_XT.sum(0).unbind(), strict=True))

    def counts(self, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Task -> how many candidates have a label, scalar."""
        return dict(zip(tasks, self.observed_CT.sum(0).unbind(), strict=True))


# Logits [C, T], labels [C, T] and weights [C] -> losses.
Objective = Callable[[Tensor, Tensor, Tensor], Losses]


def pointwise(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Objective:
    """An objective that looks at candidates one by one.

    Args:
        loss: logits, labels and weights, each [C, T], -> weighted losses [C, T]. Where a label was not
            observed, it is given as 0 with weight 0.
    """

    @wraps(loss)
    def objective(logits_CT: Tensor, labels_CT: Tensor, weight_C: Tensor) -> Losses:
        observed = ~torch.isnan(labels_CT)
        labels = labels_CT.nan_to_num(0.0, torch.inf, -torch.inf)
        return Losses(loss(logits_CT, labels, weight_C[:, None] * observed), observed)

    return objective


def rank_loss(total: Tensor, step_candidates: int, world_size: int, counted: bool) -> Tensor:
    """What a rank calls backward on.

    DistributedDataParallel and TorchRec average gradients over ranks; scaling the rank's sum by
    world_size / (candidates of the whole step) makes that average the gradient of the global mean.
    """
    return total * (world_size / step_candidates if counted else 0.0)
