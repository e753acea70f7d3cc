"""From the sequence model's output to one logit a candidate and task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """LayerNorm, then Linear and PReLU layers, then one linear output a task.

    LayerNorm stands where DARE's code has BatchNorm1d: its result does not depend on who else is in the
    batch, so training, evaluation, ranks and serving agree without running statistics.
    """

    def __init__(self, width: int, hidden: Sequence[int], tasks: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.LayerNorm(width)]
        for size in hidden:
            layers += [nn.Linear(width, size), nn.PReLU()]
            width = size
        self.layers = nn.Sequential(*layers, nn.Linear(width, tasks))

    def forward(self, parts: list[Tensor]) -> Tensor:
        """Parts, each [C, *] -> logits [C, T]."""
        logits: Tensor = self.layers(torch.cat(parts, dim=1))
        return logits
