"""The update rule of AdaTask: each task has a backward pass, and a state of its own of all it shares.

The losses go backward one after the other, down to the looked-up vectors and the dense weights and no further
(`torch.autograd.grad`), which takes no exchange between ranks. Each task's gradient of the vectors then goes
into its own lane of the tables (`embeddings.groups.EmbeddingSet.losses`), all in one backward pass, and its
dense gradients, averaged over ranks before they are squared, go into its own state (`PerTaskAdam`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.types import ShardingPlan, ShardingType

from embeddings.errors import ConfigError
from trainer.model.border import Cut, Pull
from trainer.objectives.step_loss import Losses
from trainer.update.dense_optimizer import PerTaskAdam


def check_no_replicas(plan: ShardingPlan) -> None:
    """Raises ConfigError where tables lie on every rank: their gradients are averaged by the one backward
    pass that goes through DistributedDataParallel, which this rule does without."""
    for tables in plan.plan.values():
        for name, table in tables.items():
            if table.sharding_type == ShardingType.DATA_PARALLEL.value:
                raise ConfigError(
                    f'update = "per_task": table {name} is data_parallel in this plan; plan again without '
                    "that type, or leave plan.file out"
                )


class PerTask:
    """See `Summed` for what a rule is asked.

    A task takes part in a step where some candidate of it is observed on any rank; the others change nothing.

    Args:
        weights: the dense ones, by name; reach: of each, the tasks whose losses reach it.
        optimizer: that is given the gradients.
        world_size: ranks.
    """

    wrapped, by_task = False, True

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        reach: Mapping[str, Sequence[str]],
        optimizer: PerTaskAdam,
        world_size: int,
    ) -> None:
        self._weights, self._reach, self._optimizer = weights, reach, optimizer
        self._world_size = world_size
        self._losses: dict[str, Tensor] = {}
        self._dense: dict[str, dict[str, Tensor]] = {}

    def start(self, losses: Losses, of_rank: Callable[[Tensor], Tensor]) -> Tensor:
        self._losses = {task: of_rank(loss) for task, loss in losses.by_task.items()}
        # Something whose backward pass does nothing.
        return losses.total().detach().requires_grad_()

    def pulls(self, cuts: Sequence[Cut]) -> list[Pull]:
        losses, self._losses = self._losses, {}
        leaves, found = [cut.outside for cut in cuts], list[dict[str, Tensor]]()
        self._dense = {}
        for place, (task, loss) in enumerate(losses.items(), 1):
            names = [
                name
                for name, weight in self._weights.items()
                if weight.requires_grad and task in self._reach[name]
            ]
            inputs = [*leaves, *(self._weights[name] for name in names)]
            gradients: Sequence[Tensor | None] = [None] * len(inputs)
            if loss.requires_grad and inputs:
                more = place < len(losses)
                gradients = torch.autograd.grad(loss, inputs, retain_graph=more, allow_unused=True)
            # Zeros and not None: all ranks exchange the same. They lie as the weights do, as a backward pass
            # would leave them: fused optimizers look at no strides.
            full = [
                torch.zeros_like(given) if gradient is None else gradient.contiguous()
                for given, gradient in zip(inputs, gradients, strict=True)
            ]
            found.append({cut.group: gradient for cut, gradient in zip(cuts, full[: len(cuts)], strict=True)})
            self._dense[task] = dict(zip(names, full[len(cuts) :], strict=True))
        self._average()
        self._optimizer.give(self._dense)
        pulls = []
        for cut in cuts:
            of_tasks = {task: each[cut.group] for task, each in zip(losses, found, strict=True)}
            pulls += cut.by_task(of_tasks)
        return pulls

    def dense(self) -> dict[str, Tensor]:
        return {
            f"{name} by task {task}": gradient
            for task, gradients in self._dense.items()
            for name, gradient in gradients.items()
        }

    def _average(self) -> None:
        """Average dense gradients over ranks, all tasks in one exchange."""
        parts = [gradient for gradients in self._dense.values() for gradient in gradients.values()]
        if self._world_size == 1 or not parts:
            return
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat)
        flat /= self._world_size
        averaged = iter(flat.split([part.numel() for part in parts]))
        for gradients in self._dense.values():
            for name, gradient in gradients.items():
                gradients[name] = next(averaged).view_as(gradient)
