"""Target-relative time: rank from the request back, and log-bucketed age.

Both are recomputed for every request, never stored as absolute times (TIN, section 3.2; DARE, section 2.2).
The target itself sits at rank 0 and age bucket 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

AGE_BUCKETS = 64
_BUCKETS_PER_OCTAVE = 2


def age_bucket(seconds: Tensor) -> Tensor:
    """Ages in seconds (any shape, > 0) -> int64 buckets in [1, AGE_BUCKETS), two for every doubling.

    Bucket 63 begins at about 2 ** 31 seconds.
    """
    octave = torch.log2(seconds.clamp(min=1).to(torch.float64))
    return (1 + (octave * _BUCKETS_PER_OCTAVE).floor().to(torch.int64)).clamp(1, AGE_BUCKETS - 1)


class TimeBias(nn.Module):
    """Additive stage-one bias of a behavior, b_position[rank] + b_age[bucket].

    As the target's time id is constant, the time part of DARE's score, <P[0], P[p]> / sqrt(d), is one scalar
    a rank for every target; it is learned here directly (specification of DARE's code, temporal encoding).
    """

    def __init__(self, history_length: int, position: bool, age: bool) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(history_length + 1)) if position else None
        self.age = nn.Parameter(torch.zeros(AGE_BUCKETS)) if age else None

    def forward(self, rank: Tensor, bucket: Tensor) -> Tensor:
        """Int64 `rank` and `bucket` of equal shape -> float32 of that shape."""
        bias = torch.zeros(rank.shape, device=rank.device)
        for table, index in ((self.position, rank), (self.age, bucket)):
            if table is not None:
                # Not table[index]: its backward adds in whatever order the threads come by.
                bias = bias + nn.functional.embedding(index, table[:, None]).squeeze(-1)
        return bias


class TimeEncoding(nn.Module):
    """Stage-two encodings added to target and behaviors, from the same tables (TIN, equation 4).

    The encoding of a weighted sum of behaviors is the weighted sum of their encodings, so `pooled` never
    builds one vector a behavior.
    """

    def __init__(self, history_length: int, width: int, position: bool, age: bool) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(history_length + 1, width)) if position else None
        self.age = nn.Parameter(torch.zeros(AGE_BUCKETS, width)) if age else None

    def target(self, target_CD: Tensor) -> Tensor:
        """Add the encodings of rank 0 and age 0."""
        for table in (self.position, self.age):
            if table is not None:
                target_CD = target_CD + table[0]
        return target_CD

    def pooled(self, pooled_CD: Tensor, weight_CK: Tensor, rank_CK: Tensor, bucket_CK: Tensor) -> Tensor:
        """Add sum_k weight[c, k] * encoding[k] to each pooled vector."""
        for table, index_CK in ((self.position, rank_CK), (self.age, bucket_CK)):
            if table is not None:
                pooled_CD = pooled_CD + weighted_bags(table, index_CK, weight_CK)
        return pooled_CD


def weighted_bags(rows_ND: Tensor, index_CK: Tensor, weight_CK: Tensor) -> Tensor:
    """sum_k weight[c, k] * rows[index[c, k]] -> [C, D], without a [C, K, D] intermediate."""
    return nn.functional.embedding_bag(index_CK, rows_ND, per_sample_weights=weight_CK, mode="sum")
