"""Target attention: behaviors are pooled with the weights of stage one's scorer (DIN, TIN, TWIN, DARE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.model.ops.bags import weighted_bags
from trainer.model.read.sequence import Behaviors, TargetPooling, split_parts
from trainer.model.retrieve.score import FeatureProjection, begin_alike
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
        cross: width of cross features, which stand beside the behaviors' representation and pass the heads'
            maps with it (the unsplit K of TWIN, section 4.3); only with several heads.
    """

    takes_columns = True
    takes_cross = True

    @classmethod
    def build(cls, settings: Any, sizes: BranchSizes) -> TargetAttention:
        widths = sizes.representation.widths() if settings.projection == "feature" else ()
        width, time = sizes.representation.width, sizes.encoding()
        return cls(width, time, settings.target_aware, settings.heads, widths, sizes.cross_values)

    def __init__(
        self,
        width: int,
        time: TimeEncoding,
        target_aware: bool = True,
        heads: int = 1,
        widths: Sequence[int] = (),
        cross: int = 0,
    ) -> None:
        super().__init__(width + time.columns, target_aware)
        self.heads, self.time, self.cross = heads, time, cross
        self.target, self.value = (FeatureProjection(widths) if widths else None for _ in range(2))
        if self.target is not None and self.value is not None:
            begin_alike(self.target, self.value)
        if heads > 1:
            width = self.width
            self.per_head = nn.Linear(width + cross, width * heads, bias=False)
            self.unite = nn.Linear(width * heads, width, bias=False)
            # Starts as the mean of plain attention heads.
            with torch.no_grad():
                self.per_head.weight.copy_(torch.eye(width, width + cross).repeat(heads, 1))
                self.unite.weight.copy_(torch.eye(width).repeat(1, heads) / heads)

    def forward(self, behaviors: Behaviors, weight_CHK: Tensor | None) -> list[Tensor]:
        return self.read_sets([self], [self.width], behaviors, weight_CHK)[0]

    @classmethod
    def read_sets(
        cls, models: Sequence[Any], widths: Sequence[int], behaviors: Behaviors, weight_CHK: Tensor | None
    ) -> list[list[Tensor]]:
        """Weights are the same for all sets, so rows of all of them are added up in one pass."""
        assert weight_CHK is not None
        first: TargetAttention = models[0]
        times = [model.time for model in models[1:]]
        target_CD, value_SD = behaviors.target_CD, behaviors.value_SD
        if first.target is not None and first.value is not None:
            target_CD = _each([model.target for model in models], target_CD, widths)
            value_SD = _each([model.value for model in models], value_SD, widths)
        target_CD = first.time.target(target_CD, behaviors.group_C, times)
        pooled = [
            _pooled(first.time, times, value_SD, weight_CHK[:, head], behaviors)
            for head in range(first.heads)
        ]
        united_CD = pooled[0]
        if first.heads > 1:
            of_sets = split_parts(pooled, widths)
            if first.cross:
                cross = [_pooled_cross(behaviors, weight_CHK[:, head]) for head in range(first.heads)]
                of_sets = [
                    [torch.cat(both, dim=1) for both in zip(own, cross, strict=True)] for own in of_sets
                ]
            united = [model.united(of_set) for model, of_set in zip(models, of_sets, strict=True)]
            united_CD = united[0] if len(united) == 1 else torch.cat(united, dim=1)
        return split_parts(first.parts(target_CD, united_CD), widths)

    def united(self, pooled: Sequence[Tensor]) -> Tensor:
        """What each head pooled, [C, D] -> [C, D]. W^V leaves the sum as well: it is applied here."""
        maps = zip(pooled, self.per_head.weight.chunk(self.heads), strict=True)
        united_CD: Tensor = self.unite(torch.cat([F.linear(each, weight) for each, weight in maps], dim=1))
        return united_CD


def _each(maps: Sequence[nn.Module], vector_ND: Tensor, widths: Sequence[int]) -> Tensor:
    """Each set's vectors by its own map."""
    if len(maps) == 1:
        return maps[0](vector_ND)  # type: ignore[no-any-return]
    parts = vector_ND.split(list(widths), dim=1)
    return torch.cat([map_(part) for map_, part in zip(maps, parts, strict=True)], dim=1)


def _pooled_cross(behaviors: Behaviors, weight_CK: Tensor) -> Tensor:
    """Weighted sums of the kept behaviors' cross features, [C, cross]."""
    beside_ND = behaviors.raw.beside_ND
    assert beside_ND is not None
    if behaviors.whole:
        return pooled_windows(beside_ND, behaviors.index, behaviors.windows, weight_CK)
    return weighted_bags(beside_ND, behaviors.index, weight_CK)


def _pooled(
    time: TimeEncoding,
    beside: Sequence[TimeEncoding],
    value_SD: Tensor,
    weight_CK: Tensor,
    behaviors: Behaviors,
) -> Tensor:
    if behaviors.whole:
        pooled_CD = pooled_windows(value_SD, behaviors.place, behaviors.windows, weight_CK)
    else:
        pooled_CD = weighted_bags(value_SD, behaviors.place, weight_CK)
    marks, group_C = behaviors.selection.marks, behaviors.group_C
    return time.pooled(pooled_CD, weight_CK, marks, group_C, many=behaviors.whole, beside=beside)
