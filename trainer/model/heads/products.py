"""Tasks whose probability is the product of other tasks' probabilities (ESMM)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config.tasks import Task
from trainer.model.heads.head import HeadOutput
from trainer.model.ops.precision import in_single_precision


def product_log_odds(logits: Sequence[Tensor]) -> Tensor:
    """Log odds of p = prod_i sigmoid(z_i), [C] float32, from log odds z_i [C].

    log p is the sum of log sigmoid(z_i). For log(1 - p), the ways in which the product fails are added up by
    the first factor that does: 1 - p = sum_i (1 - p_i) prod_{j<i} p_j. So no difference of probabilities is
    taken, and values and gradients are finite for all finite z.
    """
    with in_single_precision(logits[0].device):
        held_C = torch.zeros_like(logits[0], dtype=torch.float32)
        fails = []
        for logit_C in logits:
            fails.append(held_C + F.logsigmoid(-logit_C.float()))
            held_C = held_C + F.logsigmoid(logit_C.float())
        return held_C - torch.stack(fails).logsumexp(0)


class Products(nn.Module):
    """What a head says of tasks with a tower -> the same of all tasks, in their order.

    A task with a product has the base 0 where there are bases: it has no logit of a negative class. It is a
    module, so that TorchRec's trace does not enter it.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)

    def forward(self, output: HeadOutput) -> HeadOutput:
        tasks = self.tasks
        if all(task.has_tower for task in tasks):
            return output
        towers = [task.name for task in tasks if task.has_tower]
        logits = dict(zip(towers, output.logits.unbind(1), strict=True))
        columns, bases = [], []
        for task in tasks:
            parts = [logits[name] for name in task.settings.product or (task.name,)]
            columns.append(product_log_odds(parts) if task.settings.product else parts[0].float())
            if output.base is not None:
                has = task.has_tower
                bases.append(output.base[:, towers.index(task.name)] if has else torch.zeros_like(parts[0]))
        base_CT = torch.stack(bases, dim=1) if bases else None
        return output._replace(logits=torch.stack(columns, dim=1), base=base_CT)
