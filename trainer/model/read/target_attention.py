"""Target attention: behaviors are pooled with the weights of stage one's scorer (DIN, TIN, TWIN, DARE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.model.ops.bags import weighted_bags
from trainer.model.read.sequence import Behaviors, TargetPooling
from trainer.model.retrieve.score import FeatureProjection
from trainer.model.sizes import BranchSizes
from trainer.model.time import TimeEncoding
from trainer.model.windows import pooled_windows


class TargetAttention(TargetPooling):
    """Pools behaviors with given weights and multiplies with the target: u = sum_k w_k (e_k * v_t).

    The product with the target leaves the sum (TIN, equation 6; DARE, section 3.3), so the head is given
    [v_t ; h ; v_t * h] with h = sum_k w_k e_k; both v_t and e_k carry their time encodings.

    Args:
        width: D of the representation.
        time: encodings of target and behaviors.
        target_aware: without it the head is given [v_t ; h].
        heads: with several, each pools its own linear map of the behaviors, and one map unites them (W^V and
            W^O of TWIN, section 4.3).
        widths: of the features, where each side has projections of its own (DARE's `TWIN w/ proj.`).
    """

    @classmethod
    def build(cls, settings: Any, sizes: BranchSizes) -> TargetAttention:
        widths = sizes.representation.widths() if settings.projection == "feature" else ()
        width, time = sizes.representation.width, sizes.encoding()
        return cls(width, time, settings.target_aware, settings.heads, widths)

    def __init__(
        self,
        width: int,
        time: TimeEncoding,
        target_aware: bool = True,
        heads: int = 1,
        widths: Sequence[int] = (),
    ) -> None:
        super().__init__(width, target_aware)
        self.heads, self.time = heads, time
        self.target, self.value = (FeatureProjection(widths) if widths else None for _ in range(2))
        if heads > 1:
            self.per_head = nn.Linear(width, width * heads, bias=False)
            self.unite = nn.Linear(width * heads, width, bias=False)
            # Starts as the mean of plain attention heads.
            with torch.no_grad():
                self.per_head.weight.copy_(torch.eye(width).repeat(heads, 1))
                self.unite.weight.copy_(torch.eye(width).repeat(1, heads) / heads)

    def forward(self, behaviors: Behaviors, weight_CHK: Tensor | None) -> list[Tensor]:
        assert weight_CHK is not None
        target_CD, value_SD = behaviors.target_CD, behaviors.value_SD
        if self.target is not None and self.value is not None:
            target_CD, value_SD = self.target(target_CD), self.value(value_SD)
        target_CD = self.time.target(target_CD, behaviors.group_C)
        pooled = [self._pooled(value_SD, weight_CHK[:, head], behaviors) for head in range(self.heads)]
        if self.heads == 1:
            return self.parts(target_CD, pooled[0])
        # W^V leaves the sum as well: it is applied to what each head pooled.
        maps = zip(pooled, self.per_head.weight.chunk(self.heads), strict=True)
        united_CD = self.unite(torch.cat([F.linear(each, weight) for each, weight in maps], dim=1))
        return self.parts(target_CD, united_CD)

    def _pooled(self, value_SD: Tensor, weight_CK: Tensor, behaviors: Behaviors) -> Tensor:
        if behaviors.whole:
            pooled_CD = pooled_windows(value_SD, behaviors.place, behaviors.windows, weight_CK)
        else:
            pooled_CD = weighted_bags(value_SD, behaviors.place, weight_CK)
        marks, group_C = behaviors.selection.marks, behaviors.group_C
        return self.time.pooled(pooled_CD, weight_CK, marks, group_C, many=behaviors.whole)
