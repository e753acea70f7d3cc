"""MUSE: attention by ids mixed with the similarity of contents, and a histogram of these similarities."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.config.model import BranchKeys
from trainer.model.ops.bags import dots, weighted_bags
from trainer.model.read.sequence import Behaviors, TargetPooling
from trainer.model.retrieve.score import softmax_weights, twin_projections
from trainer.model.sizes import BranchSizes
from trainer.model.time import TimeEncoding


class MuseKeys(BranchKeys):
    """What a branch may set besides, for the sequence model `muse`."""

    content_tiers: int = Field(20, ge=2, le=1000)
    """The number of equal parts of [-1, 1] whose cosines `muse` counts (SimTier)."""


class Muse(TargetPooling):
    """The second stage of MUSE (Wu et al. 2025, section 4): SA-TA and SimTier over the kept behaviors.

    With r the cosine of the contents of candidate and behavior, which nothing trains,

        b = g1 a + g2 r + g3 a r,   a = <v W_q, e W_k> / sqrt(D),   u = sum softmax(b) e W_v

    The head is given [v_t ; u ; v_t * u] and, for each tier, the logarithm of how many r lie in it times a
    learned number. Contents are the attention vectors, of a group whose rows come from a file. See
    docs/specs/muse.md for what is the paper's and what is ours.

    Args:
        width: D; tiers: of the histogram; time: encodings of target and behaviors.
        target_aware: without it the product with the target is left out.
    """

    keys = MuseKeys
    needs_vectors = True
    needs_content = True
    scores_values = True

    @classmethod
    def problem(cls, settings: Any) -> str:
        """Its search compares contents alone; nothing would train what is in that score besides."""
        marks = settings.position or settings.age or settings.level
        besides = {
            'time_in = ["values"]': marks and "scores" in settings.time_in,
            'cross_in = ["values"], or no roles.cross': (
                bool(settings.roles.cross) and "scores" in settings.cross_in
            ),
            'projection = "none"': settings.projection != "none",
            'score = "dot"': settings.score != "dot",
            'weights = "softmax"': settings.weights != "softmax",
            "no attention_owner": bool(settings.attention_owner),
        }
        wanted = next((want for want, missing in besides.items() if missing), "")
        words = 'sequence = "muse" searches by contents alone and has attention of its own: it takes'
        return f"{words} {wanted}" if wanted else ""

    @classmethod
    def build(cls, settings: Any, sizes: BranchSizes) -> Muse:
        width, time = sizes.representation.width, sizes.encoding()
        return cls(width, settings.content_tiers, time, target_aware=settings.target_aware)

    def __init__(self, width: int, tiers: int, time: TimeEncoding, *, target_aware: bool = True) -> None:
        super().__init__(width, target_aware)
        self.tiers, self.time = tiers, time
        self.query, self.key = twin_projections(width, 1, width)
        self.value = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.value.weight)
        # The cosine weighs as much as with a temperature of a tenth.
        self.mix = nn.Parameter(torch.tensor([1.0, 10.0, 1.0]))
        self.tier_scale = nn.Parameter(torch.ones(tiers))

    @property
    def output_width(self) -> int:
        return super().output_width + self.tiers

    def forward(self, behaviors: Behaviors, weight_CHK: Tensor | None) -> list[Tensor]:
        selection, group_C, raw = behaviors.selection, behaviors.group_C, behaviors.raw
        cosine_CK = dots(raw.query_CD.detach(), raw.key_ND.detach(), selection.index)
        target_CD = self.time.target(behaviors.target_CD, group_C)
        # <e W_k, q> = <e, q W_k^T>: no projected copy of the behaviors.
        folded_CD = self.query(target_CD) @ self.key.weight * self.width**-0.5
        score_CK = dots(folded_CD, behaviors.value_SD, behaviors.place_CK)
        score_CK = score_CK + self.time.scores(folded_CD, selection.marks, group_C)
        weight_CK = softmax_weights(self.mixed(score_CK, cosine_CK), selection.mask)
        pooled_CD = weighted_bags(behaviors.value_SD, behaviors.place_CK, weight_CK)
        pooled_CD = self.value(self.time.pooled(pooled_CD, weight_CK, selection.marks, group_C))
        return [*self.parts(target_CD, pooled_CD), self.histogram(cosine_CK, selection.mask)]

    def mixed(self, score_CK: Tensor, cosine_CK: Tensor) -> Tensor:
        """SA-TA: scores of ids, cosines of contents and their products, each with a learned weight."""
        of_ids, of_content, of_both = self.mix
        mixed: Tensor = of_ids * score_CK + of_content * cosine_CK + of_both * score_CK * cosine_CK
        return mixed

    def histogram(self, cosine_CK: Tensor, mask_CK: Tensor) -> Tensor:
        """SimTier: ln(1 + cosines in each tier) times a learned number, [C, tiers].

        A tier holds its lower bound and the last one its upper bound too. Cosines are exact, so that a bound
        is no matter of rounding.
        """
        tier_CK = ((cosine_CK + 1) * (self.tiers / 2)).floor().to(torch.int64).clamp(0, self.tiers - 1)
        count_CT = cosine_CK.new_zeros(cosine_CK.shape[0], self.tiers)
        count_CT = count_CT.scatter_add(1, tier_CK, mask_CK.to(cosine_CK.dtype))
        return count_CT.log1p() * self.tier_scale
