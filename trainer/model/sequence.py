"""Stage two (ESU): attention over the kept behaviors, and their pooled representation."""

from __future__ import annotations

from torch import Tensor, nn

from trainer.model.time import TimeEncoding, weighted_bags


def kept_scores(query_CD: Tensor, key_ND: Tensor, index_CK: Tensor) -> Tensor:
    """<query_c, key_index[c, k]> / sqrt(D) -> [C, K], with gradient to both sides."""
    key_CKD = nn.functional.embedding(index_CK, key_ND)
    score_CK: Tensor = (key_CKD @ query_CD.unsqueeze(2)).squeeze(2) * query_CD.shape[1] ** -0.5
    return score_CK


def softmax_weights(score_CK: Tensor, mask_CK: Tensor) -> Tensor:
    """Softmax over the kept behaviors only; all zero where nothing was kept."""
    score_CK = score_CK.masked_fill(~mask_CK, -1e30)
    return score_CK.softmax(dim=1) * mask_CK


def sigmoid_weights(score_CK: Tensor, mask_CK: Tensor) -> Tensor:
    """Pointwise, unnormalised weights: how often counts, not only which. Zero for padding."""
    return score_CK.sigmoid() * mask_CK


class TargetAttention(nn.Module):
    """Pools behaviors with given weights and multiplies with the target: u = sum_k w_k (e_k * v_t).

    The product with the target leaves the sum (TIN, equation 6; DARE, section 3.3), so the head is given
    [v_t ; h ; v_t * h] with h = sum_k w_k e_k; both v_t and e_k carry their time encodings.

    Args:
        width: D of the representation.
        history_length: L, for the time tables.
        target_aware: without it the head is given [v_t ; h].
    """

    def __init__(
        self, width: int, history_length: int, *, target_aware: bool, position: bool, age: bool
    ) -> None:
        super().__init__()
        self.width, self.target_aware = width, target_aware
        self.time = TimeEncoding(history_length, width, position, age)

    @property
    def output_width(self) -> int:
        return self.width * (3 if self.target_aware else 2)

    def forward(
        self,
        target_CD: Tensor,
        behavior_ND: Tensor,
        index_CK: Tensor,
        weight_CK: Tensor,
        rank_CK: Tensor,
        bucket_CK: Tensor,
    ) -> list[Tensor]:
        """-> the parts of the head's input, each [C, D]; `index_CK` points into `behavior_ND`."""
        target_CD = self.time.target(target_CD)
        pooled_CD = weighted_bags(behavior_ND, index_CK, weight_CK)
        pooled_CD = self.time.pooled(pooled_CD, weight_CK, rank_CK, bucket_CK)
        parts = [target_CD, pooled_CD]
        return [*parts, target_CD * pooled_CD] if self.target_aware else parts
