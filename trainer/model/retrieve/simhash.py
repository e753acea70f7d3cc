"""Behaviors whose hash codes are nearest to the candidate's (ETA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.model.ops.signs import random_planes, sign_bits
from trainer.model.retrieve.search import Query, Search, lowest_costs
from trainer.model.sizes import BranchSizes


class HammingSearch(Search):
    """ETA: the K behaviors whose SimHash codes differ from the candidate's in the fewest bits.

    Codes are signs of one fixed random projection of the live attention vectors. Nothing is trained and
    nothing is stored, so codes are never stale. The paper counts differing bits by XOR and popcount. Here, in
    training and in a server, the same order comes from a product of signs s of 1 and -1, as the distance is
    (bits - <s, s'>) / 2: exact small integers (a test compares them with XOR and popcount of packed codes).

    Args:
        k: K; width: D of the vectors; bits: of a code; seed: of the projection.
    """

    uses = frozenset({"k", "hash_bits"})
    by_score = True
    needs_vectors = True
    planes: Tensor

    def __init__(self, k: int, width: int, bits: int, seed: int) -> None:
        super().__init__(k)
        self.register_buffer("planes", random_planes(width, bits, seed))

    @classmethod
    def build(cls, settings: Any, sizes: BranchSizes) -> HammingSearch:
        return cls(settings.k, sizes.width, settings.hash_bits, sizes.seed)

    @classmethod
    def export_obstacle(cls, settings: Any) -> str:
        kind = f'search = "{settings.search}"'
        return f"{kind} compares bits of codes of whole behaviors, which are no sum over features"

    def of_behaviors(self, key_ND: Tensor) -> dict[str, Tensor]:
        return {"code": self._bits(key_ND)}

    def _bits(self, vector_ND: Tensor) -> Tensor:
        return sign_bits(vector_ND, self.planes)

    def columns(self, query: Query) -> tuple[Tensor, Tensor]:
        windows = query.windows
        of_candidate = self._bits(query.raw.query_CD).float() * 2 - 1
        of_behavior = query.raw.known_or("code", self._bits).float() * 2 - 1
        # Twice the distance is bits - <signs, signs>: exact small integers, by a matrix product.
        key_WXB = F.embedding(windows.index, of_behavior)
        alike = windows.slots.collect(windows.slots.spread(of_candidate) @ key_WXB.transpose(1, 2))
        return lowest_costs(-alike.to(torch.int64), windows, self.k)
