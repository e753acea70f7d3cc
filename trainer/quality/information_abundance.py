"""Information abundance: how many dimensions of a table carry what it knows (Multi-Embedding, section 3)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from embeddings.lookup.shards import LocalShard, local_shards
from embeddings.private import ShardedTensor
from trainer.quality.singular_values import SingularValues, abundance

# Rows that ranks put together at a time.
_BAND = 65_536


def information_abundance(table: Tensor | ShardedTensor) -> float:
    """IA = sum of the singular values / the largest of them, between 1 and the width; 0 for a table of zeros.

    A sharded table is read where it lies, so the call is collective. IA is at most the number of rows, too:
    compare it with that of a random table of the same shape.
    """
    return abundance(_spectrum(table).values())


def _spectrum(table: Tensor | ShardedTensor) -> SingularValues:
    """Of a table E [rows, K], the same on all ranks."""
    rows, width = table.size()
    shards, found = list(local_shards(table)), SingularValues(width)
    parts = table.metadata().shards_metadata if isinstance(table, ShardedTensor) else []
    if any(part.shard_sizes[1] < width for part in parts):
        # Columns of a row lie on several ranks.
        for band_RK in _bands(shards, rows, width):
            found.add(band_RK)
        return found
    for shard in shards:
        found.add(shard.tensor)
    if not isinstance(table, ShardedTensor):
        return found
    # Rows of zeros change no singular value, and let all ranks send as much.
    mine_KK = torch.zeros(width, width, dtype=torch.float64, device=_device_of(shards))
    mine_KK[: len(found.triangle)] = found.triangle
    every = [torch.empty_like(mine_KK) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine_KK)
    total = SingularValues(width)
    total.merge(every)
    return total


def _bands(shards: list[LocalShard], rows: int, width: int) -> Iterator[Tensor]:
    """Whole rows, some at a time, the same on all ranks: collective."""
    device = _device_of(shards)
    for first in range(0, rows, _BAND):
        band_RK = torch.zeros(min(_BAND, rows - first), width, dtype=torch.float64, device=device)
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
