"""A head for two towers, whose vectors a server can keep apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.heads.head import Head


class DotHead(Head):
    """Two towers: <user, item> / sqrt(D), scaled for each task, plus a linear score of the item's side.

    Args:
        width: D of user and item; beside: width of what else is known of the candidate; tasks: T.
    """

    compile_obstacle = "is one product"

    @classmethod
    def build(cls, model: Any, widths: Sequence[int], beside: int, tasks: int) -> DotHead:
        return cls(sum(widths) // 2, beside, tasks)

    @classmethod
    def problem(cls, model: Any) -> str:
        fits = model.sequence_kind.two_towers and not model.branches
        return "" if fits else 'head = "dot" goes with sequence = "sasrec" and no further branches'

    def __init__(self, width: int, beside: int, tasks: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(tasks))
        self.item = nn.Linear(width + beside, tasks)

    def forward(self, parts: list[Tensor]) -> Tensor:
        """[user [C, D], item [C, D], whatever is beside] -> logits [C, T]."""
        user, *item = parts
        product_C1 = (user * item[0]).sum(1, keepdim=True) * user.shape[1] ** -0.5
        logits: Tensor = product_C1 * self.scale + self.item(torch.cat(item, dim=1))
        return logits
