"""What a loss of single candidates is, and what all losses share.

A label that is NaN was not observed: its candidate has no loss, no gradient and no part in the count of that
task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GAMMA = 2.0


@dataclass(frozen=True)
class Points:
    """Candidates one by one, and the labels of T tasks.

    Attributes:
        logits: [C, T]; labels: [C, T], 0 where not observed.
        weight: [C, T] or [C, 1], 0 where not observed.
        gamma: of an objective that has it.
        sums: [X, S, T], what `Objective.sums` asked for, added up over the candidates of all ranks; X is 1,
            or C where each domain has sums of its own. None where nothing was asked for.
    """

    logits: Tensor
    labels: Tensor
    weight: Tensor
    gamma: float = GAMMA
    sums: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """A loss that looks at candidates one by one.

    Attributes:
        losses: points -> their losses [C, T], times their weights; 0 where a weight is 0. The gradients of
            all ranks add up to the gradient of the sum over all ranks.
        sums: points -> [C, S, T], numbers that `losses` needs added up over all candidates, without gradient.
        gamma: it reads tasks.NAME.gamma.
    """

    losses: Callable[[Points], Tensor]
    sums: Callable[[Points], Tensor] | None = None
    gamma: bool = False


def observed(labels_CT: Tensor, weight_CT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> labels and weights, 0 where a label is not observed, and where it is, bool; all [C, T].

    What else is not finite stays: the check of a step would not see it otherwise.
    """
    known = ~labels_CT.isnan()
    return labels_CT.nan_to_num(0.0, torch.inf, -torch.inf), weight_CT * known, known


def by_group(numbers: Tensor, group_C: Tensor | None, groups: int) -> Tensor:
    """Add up numbers [C, ...] by group -> [groups, ...]; all are of one group where `group_C` is None."""
    if group_C is None:
        return numbers.sum(0, keepdim=True)
    return numbers.new_zeros(groups, *numbers.shape[1:]).index_add(0, group_C, numbers)


def rank_loss(total: Tensor, step_candidates: int, world_size: int, counted: bool) -> Tensor:
    """What a rank calls backward on.

    DistributedDataParallel and TorchRec average gradients over ranks; scaling the rank's sum by
    world_size / (candidates of the whole step) makes that average the gradient of the global mean.
    """
    return total * (world_size / step_candidates if counted else 0.0)
