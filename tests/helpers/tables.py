"""Tables without sharding: the slow references that sharded ones are compared with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from embeddings.first_rows import initial_rows_, table_seed
from embeddings.groups import TableGroup
from embeddings.lookup.sharding import table_of
from embeddings.lookup.shards import local_shards
from embeddings.private import ShardedTensor


def initialise_unsharded(model: nn.Module, groups: Mapping[str, TableGroup], seed: int) -> None:
    """Give plain, unsharded tables the weights they would start with under any plan."""
    for group in groups.values():
        for table in group.tables:
            name = group.table_name(table.feature)
            for parameter, weight in model.named_parameters():
                if table_of(parameter) == name or parameter.endswith(f".{name}"):
                    initial_rows_(weight.data, table_seed(seed, name), group.first)


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
