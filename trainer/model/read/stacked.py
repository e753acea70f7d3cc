"""Stacked TIN: interactions of several orders between target and behaviors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from trainer.model.read.sequence import Behaviors, SequenceModel
from trainer.model.retrieve.score import softmax_weights
from trainer.model.sizes import BranchSizes
from trainer.model.time import TimeEncoding


class StackedTin(SequenceModel):
    """Behaviors multiplied onto the target layer by layer: interactions of order 1 to l (Stacked TIN).

    u_0 = v_t; u_1 = (sum_k w_k e_k) * u_0 with the weights of stage one's scorer; and for further layers
    a_k = softmax_k(<e_k W_k, u W_q> / sqrt(D)), u_l = (sum_k a_k e_k W_v) * u_{l-1}. The head is given
    [v_t ; u_1 ; ... ; u_l]. Only the name and the order are published; the equations are ours.

    Args:
        width: D; time: encodings of target and behaviors; layers: l.
    """

    uses = frozenset({"layers"})

    @classmethod
    def problem(cls, settings: Any) -> str:
        return 'sequence = "stacked" takes one head' if settings.heads > 1 else ""

    @classmethod
    def build(cls, settings: Any, sizes: BranchSizes) -> StackedTin:
        return cls(sizes.representation.width, sizes.encoding(), settings.layers)

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
        selection, group_C = behaviors.selection, behaviors.group_C
        encoded_CKD = F.embedding(behaviors.place_CK, behaviors.value_SD)
        encoded_CKD = encoded_CKD + self.time.behaviors(selection.marks, group_C)
        target_CD = self.time.target(behaviors.target_CD, group_C)
        orders = [target_CD, _weighted(weight_CHK[:, 0], encoded_CKD) * target_CD]
        for maps in self.further:
            assert isinstance(maps, nn.ModuleDict)
            query_CD = maps["query"](orders[-1]) * self.width**-0.5
            # <e W_k, q> = <e, q W_k^T>: no projected copy of the behaviors.
            folded_CD = query_CD @ maps["key"].weight
            score_CK = (encoded_CKD @ folded_CD.unsqueeze(2)).squeeze(2)
            pooled_CD = _weighted(softmax_weights(score_CK, selection.mask), encoded_CKD)
            orders.append(maps["value"](pooled_CD) * orders[-1])
        return orders


def _weighted(weight_CK: Tensor, value_CKD: Tensor) -> Tensor:
    return (weight_CK.unsqueeze(1) @ value_CKD).squeeze(1)
