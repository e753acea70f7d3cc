"""The update rule of today: the losses of all tasks are added up, and one backward pass serves them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from trainer.model.border import Cut, Pull
from trainer.objectives.step_loss import Losses


class Summed:
    """What a step trains by, before and after the backward pass, which TorchRec's pipelines start themselves.

    Another rule differs here and nowhere else: in which losses go backward together, and in the gradients
    that tables and dense weights are given for it.

    Attributes:
        wrapped: the forward pass goes through DistributedDataParallel, which averages dense gradients.
        by_task: it needs the loss of each task.

    Args:
        weights: the dense ones, by name.
    """

    wrapped, by_task = True, False

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self._weights = weights

    def start(self, losses: Losses, of_rank: Callable[[Tensor], Tensor]) -> Tensor:
        """What the pipeline calls backward on, scalar; `of_rank`: `trainer.objectives.losses.rank_loss`."""
        return of_rank(losses.total())

    def pulls(self, cuts: Sequence[Cut]) -> list[Pull]:
        """Gradients of the vectors that were looked up, after the backward pass.

        Where a group has lanes, as other phases of the run need them, the main tables alone are trained.
        """
        return [Pull(cut.group, cut.inside, cut.gradient()) for cut in cuts]

    def dense(self) -> dict[str, Tensor]:
        """Gradients of dense weights, averaged over ranks, by names for messages."""
        return {name: weight.grad for name, weight in self._weights.items() if weight.grad is not None}
