"""From what the branches give to one logit a candidate and task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """A normalisation, then Linear and PReLU layers, then one linear output a task.

    Args:
        width: of all parts together; hidden: widths of the layers; tasks: T.
        norm: `layer` is the same in any company: training, evaluation, ranks and serving agree without
            running statistics. `batch` is the BatchNorm1d of DARE's code, whose statistics each rank takes of
            its own part of the batch, so that two ranks no longer equal one.
    """

    def __init__(
        self, width: int, hidden: Sequence[int], tasks: int, norm: Literal["layer", "batch"] = "layer"
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.LayerNorm(width) if norm == "layer" else nn.BatchNorm1d(width)]
        for size in hidden:
            layers += [nn.Linear(width, size), nn.PReLU()]
            width = size
        self.layers = nn.Sequential(*layers, nn.Linear(width, tasks))

    def forward(self, parts: list[Tensor]) -> Tensor:
        """Parts, each [C, *] -> logits [C, T]."""
        logits: Tensor = self.layers(torch.cat(parts, dim=1))
        return logits


class DotHead(nn.Module):
    """Two towers: <user, item> / sqrt(D), scaled for each task, plus a linear score of the item's side.

    Args:
        width: D of user and item; beside: width of what else is known of the candidate; tasks: T.
    """

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
