"""Information abundance: how many dimensions of a table carry what it knows (Multi-Embedding, section 3)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from embeddings.lookup.shards import LocalShard, local_shards
from embeddings.private import ShardedTensor

# Rows that ranks put together at a time.
_BAND = 65_536


def information_abundance(table: Tensor | ShardedTensor) -> float:
    """IA = sum of the singular values / the largest of them, between 1 and the width; 0 for a table of zeros.

    A sharded table is read where it lies, so the call is collective. IA is at most the number of rows, too:
    compare it with that of a random table of the same shape.
    """
    variance_K = torch.linalg.eigvalsh(_gram(table)).clamp(min=0)
    values_K: Tensor = variance_K.sqrt()
    largest = float(values_K.max())
    return float(values_K.sum()) / largest if largest > 0 else 0.0


def _gram(table: Tensor | ShardedTensor) -> Tensor:
    """E^T E of a table E [rows, K], [K, K]: float64, for it has the squares of the singular values."""
    rows, width = table.size()
    shards = list(local_shards(table))
    gram_KK = torch.zeros(width, width, dtype=torch.float64, device=_device_of(shards))
    parts = table.metadata().shards_metadata if isinstance(table, ShardedTensor) else []
    if any(part.shard_sizes[1] < width for part in parts):
        # Columns of a row lie on several ranks.
        for band_RK in _bands(shards, rows, gram_KK):
            gram_KK += band_RK.T @ band_RK
        return gram_KK
    for shard in shards:
        for part_RK in shard.tensor.detach().split(_BAND):
            gram_KK += part_RK.double().T @ part_RK.double()
    if isinstance(table, ShardedTensor):
        dist.all_reduce(gram_KK)
    return gram_KK


def _bands(shards: list[LocalShard], rows: int, like: Tensor) -> Iterator[Tensor]:
    """Whole rows, some at a time, the same on all ranks: collective."""
    for first in range(0, rows, _BAND):
        band_RK = like.new_zeros(min(_BAND, rows - first), len(like))
        for tensor, row, column in shards:
            low, high = max(row, first), min(row + len(tensor), first + len(band_RK))
            if low < high:
                columns = slice(column, column + tensor.shape[1])
                band_RK[low - first : high - first, columns] = tensor.detach()[
                    low - row : high - row
                ].double()
        dist.all_reduce(band_RK)
        yield band_RK


def _device_of(shards: list[LocalShard]) -> torch.device:
    if shards:
        return shards[0].tensor.device
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
