"""A compressed interaction network (xDeepFM, equations 6 and 8)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.model.heads.grouped import GroupedLinear
from trainer.model.heads.nets.fields import count_fields, fields_of
from trainer.model.heads.nets.net import Net
from trainer.model.ops.precision import full
from trainer.model.ops.traced import is_traced

# Products that a part of the candidates has at most, 256 MiB. Backward passes hold a few times that.
CELLS = 1 << 26


class CinNet(Net):
    """What an expert reads, and its maps X^k_h = sum_ij W^k_hij (X^{k-1}_i * X^0_j), each summed up over its
    elements. X^0 are the set's fields.

    Maps have no activation, as the paper found best. W^k has a bias here. Products are as many as pairs of
    maps and fields, so they are formed for so many candidates at once as fit into `CELLS`.
    """

    reads = frozenset({"field", "maps"})

    @classmethod
    def build(cls, experts: Any, count: int, width: int, fields: int) -> CinNet:
        return cls(count, width, count_fields("cin", fields, experts.field), experts.field, experts.maps)

    def __init__(self, experts: int, width: int, count: int, field: int, maps: Sequence[int]) -> None:
        super().__init__()
        self.count, self.field = count, field
        self.outputs = width + sum(maps)
        # Products X^{k-1}_i * X^0_j of all layers.
        self.products = count * sum([count, *maps[:-1]])
        self.layers = nn.ModuleList(
            GroupedLinear(experts, before * count, after) for before, after in pairwise([count, *maps])
        )

    def forward(self, x_ECW: Tensor) -> Tensor:
        field_ECKF = fields_of(x_ECW, self.count, self.field).transpose(2, 3)
        candidates = max(1, CELLS // (len(x_ECW) * self.field * self.products))
        if is_traced() or x_ECW.shape[1] <= candidates:
            return torch.cat([x_ECW, *self._pooled(field_ECKF)], dim=2)
        parts = []
        for some_ECKF in field_ECKF.split(candidates, dim=1):
            # The backward pass computes products again, for one part at a time.
            again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            pooled = again(self._pooled, some_ECKF) if torch.is_grad_enabled() else self._pooled(some_ECKF)
            parts.append(torch.cat(pooled, dim=2))
        return torch.cat([x_ECW, torch.cat(parts, dim=1)], dim=2)

    def _pooled(self, field_ECKF: Tensor) -> list[Tensor]:
        """The maps of each layer, summed up over their elements, [E, C, H]."""
        map_ECKH, pooled = field_ECKF, []
        for layer in self.layers:
            product_ECKX = (map_ECKH.unsqueeze(4) * field_ECKF.unsqueeze(3)).flatten(3)
            map_ECKH = full(layer(product_ECKX.flatten(1, 2))).unflatten(1, product_ECKX.shape[1:3])
            pooled.append(map_ECKH.sum(2))
        return pooled
