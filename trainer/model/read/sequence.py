"""Stage two (ESU): from kept behaviors and their weights to what the head is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.model.ops.bags import weighted_bags
from trainer.model.retrieve.score import Attended, softmax_weights
from trainer.model.time import TimeEncoding
from trainer.model.windows import Kept, Windows, pooled_windows


@dataclass(frozen=True)
class Behaviors:
    """The representation side of a batch's kept behaviors.

    Attributes:
        target_CD: of the candidates; value_SD: of the looked-up behaviors, S at least 1.
        place: int64, each kept behavior's row of `value_SD`: shape of `kept.index`, [W, X] with `whole`.
        kept: of stage one, [C, K]; [C, X] with `whole`; [W, X] where the model works on windows.
        windows: the windows that stage one searched; raw: attention vectors; group_C: target groups.
        whole: every candidate keeps its whole window.
    """

    target_CD: Tensor
    value_SD: Tensor
    place: Tensor
    kept: Kept
    windows: Windows
    raw: Attended
    whole: bool = False

    @property
    def group_C(self) -> Tensor:
        return self.raw.group_C


class SequenceModel(nn.Module):
    """Maps behaviors and weights to the parts of the head's input.

    Attributes:
        on_windows: the model wants whole windows and no attention weights; there is no stage one then.
    """

    on_windows = False

    @property
    def output_width(self) -> int:
        raise NotImplementedError

    def forward(self, behaviors: Behaviors, weight_CHK: Tensor | None) -> list[Tensor]:
        """-> parts, each [C, *]."""
        raise NotImplementedError


class TargetPooling(SequenceModel):
    """What models that pool behaviors into one vector h have in common: the head's [v_t ; h ; v_t * h].

    Args:
        width: D of the representation; target_aware: without it the head is given [v_t ; h].
    """

    def __init__(self, width: int, target_aware: bool) -> None:
        super().__init__()
        self.width, self.target_aware = width, target_aware

    @property
    def output_width(self) -> int:
        return self.width * (3 if self.target_aware else 2)

    def parts(self, target_CD: Tensor, pooled_CD: Tensor) -> list[Tensor]:
        parts = [target_CD, pooled_CD]
        return [*parts, target_CD * pooled_CD] if self.target_aware else parts


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
        marks, group_C = behaviors.kept.marks, behaviors.group_C
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


class StackedTin(SequenceModel):
    """Behaviors multiplied onto the target layer by layer: interactions of order 1 to l (Stacked TIN).

    u_0 = v_t; u_1 = (sum_k w_k e_k) * u_0 with the weights of stage one's scorer; and for further layers
    a_k = softmax_k(<e_k W_k, u W_q> / sqrt(D)), u_l = (sum_k a_k e_k W_v) * u_{l-1}. The head is given
    [v_t ; u_1 ; ... ; u_l]. Only the name and the order are published; the equations are ours.

    Args:
        width: D; time: encodings of target and behaviors; layers: l.
    """

    def __init__(self, width: int, time: TimeEncoding, layers: int) -> None:
        super().__init__()
        self.width, self.time, self.layers = width, time, layers
        self.further = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in ("query", "key", "value")})
            for _ in range(layers - 1)
        )

    @property
    def output_width(self) -> int:
        return self.width * (1 + self.layers)

    def forward(self, behaviors: Behaviors, weight_CHK: Tensor | None) -> list[Tensor]:
        assert weight_CHK is not None
        kept, group_C = behaviors.kept, behaviors.group_C
        place = behaviors.place[behaviors.windows.of_candidate] if behaviors.whole else behaviors.place
        encoded_CKD = F.embedding(place, behaviors.value_SD)
        encoded_CKD = encoded_CKD + self.time.behaviors(kept.marks, group_C)
        target_CD = self.time.target(behaviors.target_CD, group_C)
        orders = [target_CD, _weighted(weight_CHK[:, 0], encoded_CKD) * target_CD]
        for maps in self.further:
            assert isinstance(maps, nn.ModuleDict)
            query_CD = maps["query"](orders[-1]) * self.width**-0.5
            # <e W_k, q> = <e, q W_k^T>: no projected copy of the behaviors.
            folded_CD = query_CD @ maps["key"].weight
            score_CK = (encoded_CKD @ folded_CD.unsqueeze(2)).squeeze(2)
            pooled_CD = _weighted(softmax_weights(score_CK, kept.mask), encoded_CKD)
            orders.append(maps["value"](pooled_CD) * orders[-1])
        return orders


def _weighted(weight_CK: Tensor, value_CKD: Tensor) -> Tensor:
    return (weight_CK.unsqueeze(1) @ value_CKD).squeeze(1)
