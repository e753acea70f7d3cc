"""Slow references of parts of the model, for property tests: they do one thing at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.model.read.collision import HashCollision
from trainer.model.read.sequence import Behaviors
from trainer.model.retrieve.search import Query
from trainer.model.windows import Selection, Windows

_WORD = 32


def pack_bits(bits_NB: Tensor) -> Tensor:
    """Bool [N, bits] -> int64 [N, words], 32 bits a word."""
    padded = F.pad(bits_NB, (0, -bits_NB.shape[1] % _WORD)).unflatten(1, (-1, _WORD))
    power = 1 << torch.arange(_WORD, device=bits_NB.device)
    words: Tensor = padded.to(torch.int64) * power
    return words.sum(2)


def hamming(some: Tensor, other: Tensor) -> Tensor:
    """Differing bits of packed codes, int64 [..., words] -> [...]: XOR, then popcount by halving sums."""
    x = some ^ other
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    count: Tensor = (x * 0x01010101 >> 24) & 0xFF
    return count.sum(-1)


def search_reference(query: Query, k: int) -> Selection:
    """`DotSearch` of one head, one candidate at a time."""
    windows, vectors = query.windows, query.vectors
    column = torch.zeros(vectors.query_CD.shape[0], k, dtype=torch.int64)
    mask = torch.zeros(vectors.query_CD.shape[0], k, dtype=torch.bool)
    everything = windows.of_candidates()
    exact = query.doubt().exact
    for c in range(column.shape[0]):
        seen = torch.nonzero(everything.mask[c]).squeeze(1)
        scores = exact(torch.full_like(seen, c), seen)
        best = seen[scores.argsort(descending=True, stable=True)[:k]].sort().values
        column[c, : best.numel()] = best
        mask[c, : best.numel()] = True
    return windows.columns(column, mask)


def collision_reference(model: HashCollision, behaviors: Behaviors) -> Tensor:
    """The pooled vector [C, D], gathered one candidate and signature at a time."""
    windows: Windows = behaviors.windows
    of_query, of_key = (
        model.signatures(behaviors.raw.query_CD),
        model.signatures(behaviors.raw.key_ND),
    )
    pooled = behaviors.value_SD.new_zeros(of_query.shape[0], model.width)
    for c, window in enumerate(windows.of_candidate.tolist()):
        seen = windows.mask[window]
        rows = behaviors.value_SD[behaviors.place[window][seen]]
        signature = of_key[windows.index[window][seen]]
        for h in range(model.hashes):
            total = rows[signature[:, h] == of_query[c, h]].sum(0)
            pooled[c] += total / total.norm().clamp(min=1e-6) / model.hashes
    return pooled
