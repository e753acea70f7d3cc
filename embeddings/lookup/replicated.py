"""The optimizer of data-parallel tables: what the fused kernels do, on a whole table that every rank holds.

TorchRec gives such tables a dense kernel that never updates rows; left alone they would fall to the
optimizer of the dense weights. DistributedDataParallel has averaged their gradients when `step` is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchrec.optim.keyed import KeyedOptimizer

from embeddings.optimizers import FusedOptimizer


class ReplicatedOptimizer(KeyedOptimizer):  # type: ignore[misc]
    """Updates whole tables with the rule, the state and the state's name of the fused kernels.

    Args:
        tables: parameter name -> whole table [rows, dim], on every rank.
        optimizer: the group's optimizer.
    """

    def __init__(self, tables: Mapping[str, Tensor], optimizer: FusedOptimizer) -> None:
        self.optimizer = optimizer
        state: dict[Tensor, dict[str, Tensor]] = {}
        for name, weight in tables.items():
            # embedding_bags.<table>.weight: the kernels name a table's state after the table.
            table = name.split(".")[-2]
            state[weight] = {}
            if optimizer.rule.state != "none":
                shape = optimizer.rule.state_shape(*weight.shape)
                first = torch.zeros(shape, dtype=torch.float32, device=weight.device)
                state[weight][f"{table}.momentum1"] = first
        group = {"params": list(tables.values()), "lr": optimizer.learning_rate}
        super().__init__(dict(tables), state, [group])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update all rows and forget the gradients, so that a second call changes nothing."""
        rate = float(self.param_groups[0]["lr"])
        for weight in self.params.values():
            if weight.grad is None:
                continue
            (state,) = self.state[weight].values() or (torch.empty(0),)
            direction = self.optimizer.rule.direction(weight.grad.float(), state, self.optimizer.eps)
            weight.sub_(rate * direction)
        self.zero_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        # Tables of a collection are views of one tensor and its gradient: not for the loop in `step`.
        for weight in self.params.values():
            weight.grad = None
