"""SDIM: behaviors that share a hash bucket with the target, summed; no top-K and no attention weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.model.search import random_planes, sign_bits
from trainer.model.sequence import Behaviors, SequenceModel
from trainer.model.windows import Windows


class HashCollision(SequenceModel):
    """Pools a window by collisions of signatures (SDIM, Meituan 2022).

    The attention vectors get `hashes` signatures of `bits` bits each from fixed random planes. For each
    signature, all behaviors of the window with the target's own one are summed and the sum is scaled to unit
    length; the pooled vector is the mean over signatures. A behavior at angle a from the target enters with
    probability (1 - a / pi) ** bits. The sums of all buckets depend on the window alone, so a server keeps
    them per user (the paper's BSE), which is how `forward` computes them: once a window.

    Args:
        width: D of the representation; attention_width: of the hashed vectors.
        hashes, bits: signatures and their length; seed: of the planes.
        target_aware: feed the product with the target to the head too.
    """

    on_windows = True
    planes: Tensor

    def __init__(
        self, width: int, attention_width: int, hashes: int, bits: int, seed: int, *, target_aware: bool
    ) -> None:
        super().__init__()
        self.width, self.hashes, self.bits, self.target_aware = width, hashes, bits, target_aware
        self.register_buffer("planes", random_planes(attention_width, hashes * bits, seed))

    @property
    def output_width(self) -> int:
        return self.width * (3 if self.target_aware else 2)

    def signatures(self, vector_ND: Tensor) -> Tensor:
        """-> int64 [N, hashes], each below 2 ** bits."""
        bits = sign_bits(vector_ND, self.planes).unflatten(1, (self.hashes, self.bits))
        digits: Tensor = bits.to(torch.int64) << torch.arange(self.bits, device=bits.device)
        return digits.sum(2)

    def bucket_sums(self, behaviors: Behaviors) -> Tensor:
        """Sum of every bucket of every window: [W, hashes * 2 ** bits, D]."""
        windows = behaviors.windows
        signature_WXM = self.signatures(behaviors.raw.key_ND)[windows.index]
        bucket = signature_WXM + (torch.arange(self.hashes, device=signature_WXM.device) << self.bits)
        member_WBX = behaviors.value_SD.new_zeros(
            windows.index.shape[0], self.hashes << self.bits, windows.index.shape[1]
        )
        inside = windows.mask.to(member_WBX.dtype)[:, None].expand(-1, self.hashes, -1)
        member_WBX.scatter_(1, bucket.transpose(1, 2), inside)
        return member_WBX @ F.embedding(behaviors.place, behaviors.value_SD)

    def forward(self, behaviors: Behaviors, weight_CHK: Tensor | None) -> list[Tensor]:
        unit_WBD = F.normalize(self.bucket_sums(behaviors), dim=2, eps=1e-6)
        wanted_CM = self.signatures(behaviors.raw.query_CD)
        wanted_CM = wanted_CM + (torch.arange(self.hashes, device=wanted_CM.device) << self.bits)
        row_CM = behaviors.windows.of_candidate[:, None] * unit_WBD.shape[1] + wanted_CM
        pooled_CD = F.embedding_bag(row_CM, unit_WBD.flatten(0, 1), mode="mean")
        target_CD = behaviors.target_CD
        parts = [target_CD, pooled_CD]
        return [*parts, target_CD * pooled_CD] if self.target_aware else parts


def collision_reference(model: HashCollision, behaviors: Behaviors) -> Tensor:
    """The pooled vector [C, D], gathered one candidate and signature at a time: the slow reference."""
    windows: Windows = behaviors.windows
    of_query, of_key = model.signatures(behaviors.raw.query_CD), model.signatures(behaviors.raw.key_ND)
    pooled = behaviors.value_SD.new_zeros(of_query.shape[0], model.width)
    for c, window in enumerate(windows.of_candidate.tolist()):
        seen = windows.mask[window]
        rows = behaviors.value_SD[behaviors.place[window][seen]]
        signature = of_key[windows.index[window][seen]]
        for h in range(model.hashes):
            total = rows[signature[:, h] == of_query[c, h]].sum(0)
            pooled[c] += total / total.norm().clamp(min=1e-6) / model.hashes
    return pooled
