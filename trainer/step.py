"""One training step: forward, loss, backward with fused table updates, dense update."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from trainer.data.reader import Step
from trainer.loss import loss_sum, rank_loss


def make_optimizer(model: DistributedModelParallel, learning_rate: float) -> CombinedOptimizer:
    """The fused optimizers of the tables and Adam for everything dense, as one."""
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda parameters: torch.optim.Adam(parameters, lr=learning_rate),
    )
    # Adam's state is created on the first step; a checkpoint loaded before it would silently miss it.
    dense.init_state()
    return CombinedOptimizer([("fused", model.fused_optimizer), ("dense", dense)])


class RateSetter:
    """Sets all learning rates to a multiple of what they were at the start."""

    def __init__(self, model: DistributedModelParallel, optimizer: CombinedOptimizer) -> None:
        self._fused, self._optimizer = model.fused_optimizer, optimizer
        self._base = [float(group["lr"]) for group in optimizer.param_groups]

    def set(self, factor: float) -> None:
        """In force from the next backward pass on."""
        for group, base in zip(self._optimizer.param_groups, self._base, strict=True):
            group["lr"] = base * factor
        # The kernels keep a copy of the rate, which only this call renews; it updates no weight.
        self._fused.step()


def train_step(
    model: nn.Module,
    optimizer: CombinedOptimizer,
    step: Step,
    world_size: int,
    device: torch.device,
    auxiliary_weight: float = 1.0,
) -> Tensor:
    """Do one step on the main loss and, where the model has one, its auxiliary loss.

    Returns:
        This rank's part of the main loss' sum, detached (0 where the batch does not count).
    """
    batch = step.batch.to(device)
    optimizer.zero_grad()
    prediction = model(batch)
    total = loss_sum(prediction.logits, batch.labels, batch.weight)
    trained = total
    if prediction.auxiliary is not None:
        trained = total + auxiliary_weight * loss_sum(prediction.auxiliary, batch.labels, batch.weight)
    rank_loss(trained, batch.step_candidates, world_size, step.counted).backward()
    optimizer.step()
    return total.detach() if step.counted else torch.zeros_like(total)
