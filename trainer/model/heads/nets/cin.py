"""A compressed interaction network (xDeepFM, equations 6 and 8)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.heads.grouped import GroupedLinear
from trainer.model.heads.nets.fields import count_fields, fields_of
from trainer.model.heads.nets.net import Net


class CinNet(Net):
    """What an expert reads, and its maps X^k_h = sum_ij W^k_hij (X^{k-1}_i * X^0_j), each summed up over its
    elements. X^0 are the set's fields.

    Maps have no activation, as the paper found best. W^k has a bias here.
    """

    @classmethod
    def build(cls, experts: Any, count: int, width: int, fields: int) -> CinNet:
        return cls(count, width, count_fields("cin", fields, experts.field), experts.field, experts.maps)

    def __init__(self, experts: int, width: int, count: int, field: int, maps: Sequence[int]) -> None:
        super().__init__()
        self.count, self.field = count, field
        self.outputs = width + sum(maps)
        self.layers = nn.ModuleList(
            GroupedLinear(experts, before * count, after) for before, after in pairwise([count, *maps])
        )

    def forward(self, x_ECW: Tensor) -> Tensor:
        field_ECKF = fields_of(x_ECW, self.count, self.field).transpose(2, 3)
        map_ECKH, pooled = field_ECKF, []
        for layer in self.layers:
            product_ECKX = (map_ECKH.unsqueeze(4) * field_ECKF.unsqueeze(3)).flatten(3)
            map_ECKH = layer(product_ECKX.flatten(1, 2)).unflatten(1, product_ECKX.shape[1:3])
            pooled.append(map_ECKH.sum(2))
        return torch.cat([x_ECW, *pooled], dim=2)
