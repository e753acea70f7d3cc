"""Tables without sharding: the slow references that sharded ones are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from embeddings.lookup.shards import local_shards
from embeddings.private import ShardedTensor


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
