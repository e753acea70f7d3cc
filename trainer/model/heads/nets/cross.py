"""A cross network (DCNv2, equation 1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trainer.model.heads.grouped import GroupedLinear
from trainer.model.heads.nets.net import Net


class CrossNet(Net):
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, with the full matrix W. The layers behind it are DCNv2's stacked
    form."""

    reads = frozenset({"crosses"})

    @classmethod
    def build(cls, experts: Any, count: int, width: int, fields: int) -> CrossNet:
        return cls(count, width, experts.crosses)

    def __init__(self, count: int, width: int, crosses: int) -> None:
        super().__init__()
        self.outputs = width
        self.crosses = nn.ModuleList(GroupedLinear(count, width, width) for _ in range(crosses))

    def forward(self, x_ECW: Tensor) -> Tensor:
        crossed_ECW = x_ECW
        for cross in self.crosses:
            crossed_ECW = x_ECW * cross(crossed_ECW) + crossed_ECW
        return crossed_ECW
