"""No interaction but that of the layers behind."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trainer.model.heads.nets.net import Net


class MlpNet(Net):
    """What an expert reads goes to its layers as it is."""

    alike = True

    @classmethod
    def build(cls, experts: Any, count: int, width: int, fields: int) -> MlpNet:
        net = cls()
        net.outputs = width
        return net

    def forward(self, x_ECW: Tensor) -> Tensor:
        return x_ECW
