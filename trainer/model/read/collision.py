"""SDIM: behaviors that share a hash bucket with the target, summed; no top-K and no attention weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from trainer.config.model import BranchKeys
from trainer.model.ops.signs import random_planes, sign_bits
from trainer.model.ops.traced import is_traced
from trainer.model.read.sequence import Behaviors, TargetPooling, split_parts
from trainer.model.sizes import BranchSizes

# Most buckets of one window: a number for each bucket and each of 500 behaviors takes 131 MB.
_BUCKETS, _MOST_BITS = 65_536, 12
_FLOAT = 4


class CollisionKeys(BranchKeys):
    """What a branch may set besides, for the sequence model `collision`."""

    hashes: int = Field(16, ge=1, le=512)
    """The number of signatures of `collision`."""


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

    keys = CollisionKeys
    uses = frozenset({"hash_bits"})
    on_windows = True
    needs_vectors = True
    planes: Tensor

    @classmethod
    def problem(cls, settings: Any) -> str:
        hashes, bits = settings.hashes, settings.hash_bits
        buckets = hashes << bits
        if bits > _MOST_BITS:
            return (
                f'sequence = "collision" keeps hash_bits at {_MOST_BITS} at most (its buckets are '
                "2 ** hash_bits)"
            )
        if buckets <= _BUCKETS:
            return ""
        return (
            f'sequence = "collision": hashes = {hashes} of hash_bits = {bits} are {buckets:,} buckets, '
            f"{buckets * _FLOAT / 1e6:,.1f} MB for every behavior of every request; keep hashes * "
            f"2 ** hash_bits at {_BUCKETS:,} at most"
        )

    @classmethod
    def build(cls, settings: Any, sizes: BranchSizes) -> HashCollision:
        return cls(
            sizes.representation.width,
            sizes.width,
            settings.hashes,
            settings.hash_bits,
            sizes.seed,
            target_aware=settings.target_aware,
        )

    @classmethod
    def memory_problem(cls, settings: Any, section: str, window: int, requests: int, memory: int) -> str:
        """Each request has a matrix that says which bucket every behavior of its window falls into.

        The matrices of a step may take half of a rank's memory.
        """
        need = (settings.hashes << settings.hash_bits) * window * requests * _FLOAT
        if 2 * need <= memory:
            return ""
        return (
            f"{section}.hashes = {settings.hashes} with hash_bits = {settings.hash_bits} takes "
            f"{need / 1e9:,.1f} GB for the {requests:,} requests of {window:,} behaviors that a rank has "
            f"in a step, and a rank has {memory / 1e9:,.1f} GB: make them, data.history_length or "
            "data.batch_candidates smaller"
        )

    def __init__(
        self, width: int, attention_width: int, hashes: int, bits: int, seed: int, *, target_aware: bool
    ) -> None:
        super().__init__(width, target_aware)
        self.hashes, self.bits = hashes, bits
        self.register_buffer("planes", random_planes(attention_width, hashes * bits, seed))

    def signatures(self, vector_ND: Tensor) -> Tensor:
        """-> int64 [N, hashes], each below 2 ** bits."""
        bits = sign_bits(vector_ND, self.planes).unflatten(1, (self.hashes, self.bits))
        if is_traced():
            # ONNX shifts no signed numbers.
            values = torch.tensor([1 << place for place in range(self.bits)])
            summed: Tensor = (bits.to(torch.int64) * values).sum(2)
            return summed
        digits: Tensor = bits.to(torch.int64) << torch.arange(self.bits, device=bits.device)
        return digits.sum(2)

    def buckets(self, vector_ND: Tensor) -> Tensor:
        """-> int64 [N, hashes]: each signature's place among those of all hashes."""
        signature_NM = self.signatures(vector_ND)
        buckets = 1 << self.bits
        return signature_NM + torch.arange(0, self.hashes * buckets, buckets, device=signature_NM.device)

    def of_behaviors(self, key_ND: Tensor) -> dict[str, Tensor]:
        return {"bucket": self._narrow_buckets(key_ND)}

    def _narrow_buckets(self, vector_ND: Tensor) -> Tensor:
        """As they are kept: there are fewer than 2 ** 31."""
        return self.buckets(vector_ND).to(torch.int32)

    def bucket_sums(self, behaviors: Behaviors) -> Tensor:
        """Sum of every bucket of every window: [W, hashes * 2 ** bits, D]."""
        windows = behaviors.windows
        bucket_WXM = behaviors.raw.known_or("bucket", self._narrow_buckets)[windows.index].to(torch.int64)
        member_WBX = behaviors.value_SD.new_zeros(
            windows.index.shape[0], self.hashes << self.bits, windows.index.shape[1]
        )
        inside = windows.mask.to(member_WBX.dtype)[:, None].expand(-1, self.hashes, -1)
        member_WBX.scatter_(1, bucket_WXM.transpose(1, 2), inside)
        return member_WBX @ F.embedding(behaviors.place, behaviors.value_SD)

    def forward(self, behaviors: Behaviors, weight_CHK: Tensor | None) -> list[Tensor]:
        return self.read_sets([self], [self.width], behaviors, weight_CHK)[0]

    @classmethod
    def read_sets(
        cls, models: Sequence[Any], widths: Sequence[int], behaviors: Behaviors, weight_CHK: Tensor | None
    ) -> list[list[Tensor]]:
        """Buckets are the same for all sets, so rows of all of them are summed up in one pass."""
        first: HashCollision = models[0]
        sums_WBD = first.bucket_sums(behaviors)
        parts = [sums_WBD] if len(widths) == 1 else sums_WBD.split(list(widths), dim=2)
        units = [F.normalize(part, dim=2, eps=1e-6) for part in parts]
        unit_WBD = units[0] if len(units) == 1 else torch.cat(units, dim=2)
        wanted_CM = first.buckets(behaviors.raw.query_CD)
        row_CM = behaviors.windows.of_candidate[:, None] * unit_WBD.shape[1] + wanted_CM
        rows_RD = unit_WBD.flatten(0, 1)
        if is_traced():
            pooled_CD = F.embedding(row_CM, rows_RD).mean(1)
        else:
            pooled_CD = F.embedding_bag(row_CM, rows_RD, mode="mean")
        return split_parts(first.parts(behaviors.target_CD, pooled_CD), widths)
