"""Inner products of fields (PNN, section III.B)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.model.heads.nets.fields import count_fields, fields_of
from trainer.model.heads.nets.net import Net


class FmNet(Net):
    """What an expert reads, and <f_i, f_j> of all pairs i < j of its set's fields."""

    alike = True
    reads = frozenset({"field"})

    @classmethod
    def build(cls, experts: Any, count: int, width: int, fields: int) -> FmNet:
        return cls(width, count_fields("fm", fields, experts.field), experts.field)

    def __init__(self, width: int, count: int, field: int) -> None:
        super().__init__()
        self.count, self.field = count, field
        self.outputs = width + count * (count - 1) // 2

    def forward(self, x_ECW: Tensor) -> Tensor:
        field_ECFK = fields_of(x_ECW, self.count, self.field)
        products = [
            (field_ECFK[:, :, i : i + 1] * field_ECFK[:, :, i + 1 :]).sum(3) for i in range(self.count - 1)
        ]
        return torch.cat([x_ECW, *products], dim=2)
