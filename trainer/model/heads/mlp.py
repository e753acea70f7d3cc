"""A head of a few layers over all parts side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer.config.model import ModelKeys, Width
from trainer.model.heads.head import Head


class MlpKeys(ModelKeys):
    """What a model may set besides, for the head `mlp`."""

    hidden: tuple[Width, ...] = (200, 80)
    """The widths of the head's layers."""


class MlpHead(Head):
    """A normalisation, then Linear and PReLU layers, then one linear output a task.

    Args:
        width: of all parts together; hidden: widths of the layers; tasks: T.
        norm: `layer` is the same in any company: training, evaluation, ranks and serving agree without
            running statistics. `batch` is the BatchNorm1d of DARE's code, whose statistics each rank takes of
            its own part of the batch, so that two ranks no longer equal one.
    """

    keys = MlpKeys
    compile_obstacle = ""

    @classmethod
    def build(cls, model: Any, widths: Sequence[int], beside: int, tasks: int) -> MlpHead:
        return cls(sum(widths) + beside, model.hidden, tasks, model.norm)

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
        logits: Tensor = self.layers(torch.cat(parts, dim=1))
        return logits
