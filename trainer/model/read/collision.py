"""SDIM: behaviors that share a hash bucket with the target, summed; no top-K and no attention weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.model.ops.signs import sign_bits
from trainer.model.read.sequence import Behaviors, TargetPooling
from trainer.model.retrieve.search import random_planes
from trainer.model.windows import Windows


class HashCollision(TargetPooling):
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
        super().__init__(width, target_aware)
        self.hashes, self.bits = hashes, bits
        self.register_buffer("planes", random_planes(attention_width, hashes * bits, seed))

    def signatures(self, vector_ND: Tensor) -> Tensor:
        """-> int64 [N, hashes], each below 2 ** bits."""
        bits = sign_bits(vector_ND, self.planes).unflatten(1, (self.hashes, self.bits))
        digits: Tensor = bits.to(torch.int64) << torch.arange(self.bits, device=bits.device)
        return digits.sum(2)

    def buckets(self, vector_ND: Tensor) -> Tensor:
        """-> int64 [N, hashes]: each signature's place among those of all hashes."""
        signature_NM = self.signatures(vector_ND)
        return signature_NM + (torch.arange(self.hashes, device=signature_NM.device) << self.bits)

    def bucket_sums(self, behaviors: Behaviors) -> Tensor:
        """Sum of every bucket of every window: [W, hashes * 2 ** bits, D]."""
        windows = behaviors.windows
        bucket_WXM = self.buckets(behaviors.raw.key_ND)[windows.index]
        member_WBX = behaviors.value_SD.new_zeros(
            windows.index.shape[0], self.hashes << self.bits, windows.index.shape[1]
        )
        inside = windows.mask.to(member_WBX.dtype)[:, None].expand(-1, self.hashes, -1)
        member_WBX.scatter_(1, bucket_WXM.transpose(1, 2), inside)
        return member_WBX @ F.embedding(behaviors.place, behaviors.value_SD)

    def forward(self, behaviors: Behaviors, weight_CHK: Tensor | None) -> list[Tensor]:
        unit_WBD = F.normalize(self.bucket_sums(behaviors), dim=2, eps=1e-6)
        wanted_CM = self.buckets(behaviors.raw.query_CD)
        row_CM = behaviors.windows.of_candidate[:, None] * unit_WBD.shape[1] + wanted_CM
        pooled_CD = F.embedding_bag(row_CM, unit_WBD.flatten(0, 1), mode="mean")
        return self.parts(behaviors.target_CD, pooled_CD)


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
