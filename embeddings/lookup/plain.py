"""A bag collection without TorchRec's sharding: the slow reference in tests, the lookup when scoring."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from embeddings.groups import TableGroup
from embeddings.lookup.stored import RowStore, StoredTable, sum_bags


class PlainBagCollection(nn.Module):
    """Sum-pooled lookup in ordinary tensors, one table a feature.

    Args:
        group: names, order and widths.
        weights: table name -> [rows, dim], or rows stored as fp16 or int8 (`embeddings.lookup.stored`);
            memory-mapped tensors and patched ones are fine, and only rows that are asked for are read.
        trainable: register the tables as parameters (with dense gradients) instead of buffers.
    """

    def __init__(
        self, group: TableGroup, weights: Mapping[str, StoredTable], trainable: bool = False
    ) -> None:
        super().__init__()
        self.group = group
        # In the order of the group: the key that a table is looked up by, and its name.
        self._asked = [(table.key, group.table_name(table)) for table in group.all_tables]
        self._dims = [table.dim for table in group.all_tables]
        for table in group.all_tables:
            name, stored = group.table_name(table), weights[group.table_name(table)]
            if isinstance(stored, RowStore):
                # No buffer: it is none of the module's own memory, nor goes to another device.
                setattr(self, name, stored)
            elif trainable:
                self.register_parameter(name, nn.Parameter(stored.clone()))
            else:
                self.register_buffer(name, stored, persistent=False)

    def tables(self) -> dict[str, StoredTable]:
        """Table name -> what its rows are looked up in."""
        names = [self.group.table_name(table) for table in self.group.all_tables]
        return {name: getattr(self, name) for name in names}

    def put(self, name: str, stored: StoredTable) -> None:
        """Look the rows of a table up in something else that has the same rows."""
        delattr(self, name)
        if isinstance(stored, RowStore):
            setattr(self, name, stored)
        else:
            self.register_buffer(name, stored, persistent=False)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """KJT of stride B -> KeyedTensor whose values are [B, sum of dims]."""
        pooled = []
        for key, name in self._asked:
            bag = features[key]
            ids = bag.values()
            pooled.append(sum_bags(getattr(self, name), ids, bag.offsets().to(ids.dtype)))
        # The only one as it is: a copy takes as long as the lookup.
        fused = pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)
        return KeyedTensor(self.group.keys, self._dims, fused)
