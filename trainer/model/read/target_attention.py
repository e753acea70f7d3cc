"""Target attention: behaviors are pooled with the weights of stage one's scorer (DIN, TIN, TWIN, DARE)."""

from __future__ import annotations

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
        target, value: projections of the two sides (DARE's `TWIN w/ proj.`), or None.
    """

    @classmethod
    def build(cls, settings: Any, sizes: BranchSizes) -> TargetAttention:
        target = value = None
        if settings.projection == "feature":
            widths = sizes.representation.widths()
            target, value = FeatureProjection(widths), FeatureProjection(widths)
        return cls(
            sizes.representation.width,
            sizes.encoding(),
            target_aware=settings.target_aware,
            heads=settings.heads,
            target=target,
            value=value,
        )

    def __init__(
        self,
        width: int,
        time: TimeEncoding,
        *,
        target_aware: bool = True,
        heads: int = 1,
        target: nn.Module | None = None,
        value: nn.Module | None = None,
    ) -> None:
        super().__init__(width, target_aware)
        self.heads, self.time = heads, time
        self.target, self.value = target, value
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
        if self.heads == 1:
            pooled_CD = self._pooled(value_SD, weight_CHK[:, 0], behaviors)
        else:
            pooled_CD = self._united(value_SD, weight_CHK, behaviors)
        return self.parts(target_CD, pooled_CD)

    def _pooled(self, value_SD: Tensor, weight_CK: Tensor, behaviors: Behaviors) -> Tensor:
        if behaviors.whole:
            pooled_CD = pooled_windows(value_SD, behaviors.place, behaviors.windows, weight_CK)
        else:
            pooled_CD = weighted_bags(value_SD, behaviors.place, weight_CK)
        marks, group_C = behaviors.selection.marks, behaviors.group_C
        return self.time.pooled(pooled_CD, weight_CK, marks, group_C, many=behaviors.whole)

    def _united(self, value_SD: Tensor, weight_CHK: Tensor, behaviors: Behaviors) -> Tensor:
        """W^V leaves the sum as well: it is applied to what each head pooled."""
        maps = self.per_head.weight.chunk(self.heads)
        pooled = [
            F.linear(self._pooled(value_SD, weight_CHK[:, head], behaviors), maps[head])
            for head in range(self.heads)
        ]
        united: Tensor = self.unite(torch.cat(pooled, dim=1))
        return united
