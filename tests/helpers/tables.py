"""Tables without sharding, the slow references of sharded ones; and groups of several sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from embeddings.groups import EmbeddingSet, TableGroup, TableSpec
from embeddings.lookup.shards import local_shards
from embeddings.private import ShardedTensor

FEATURES = {"item": 9, "shop": 4}


def whole_tensor(weight: Tensor | ShardedTensor) -> Tensor:
    """A table in one piece, from a model sharded over a single rank; half precision becomes float32."""
    if not isinstance(weight, ShardedTensor):
        return weight.float() if weight.dtype == torch.float16 else weight
    whole = torch.empty(weight.metadata().size, dtype=torch.float32)
    for tensor, row, column in local_shards(weight):
        whole[row : row + tensor.shape[0], column : column + tensor.shape[1]] = tensor
    return whole


def to_float(stored: Tensor) -> Tensor:
    """Stored rows [n, stored_columns] -> float32 [n, dim]."""
    if stored.dtype == torch.uint8:
        rows: Tensor = torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(stored.contiguous())
        return rows
    return stored.float()


def sets_of(dims: Sequence[Sequence[int]], **given: Any) -> TableGroup:
    """A group of tables over `FEATURES`: a set for each of `dims`, which has a width for each feature."""
    sets = tuple(EmbeddingSet(str(place)) for place in range(len(dims)))
    tables = tuple(
        TableSpec(feature, rows, dim, each.name)
        for each, widths in zip(sets, dims, strict=True)
        for (feature, rows), dim in zip(FEATURES.items(), widths, strict=True)
    )
    return TableGroup("g", tables, sets=sets, **given)
