"""What a table group compiles to: a module that maps a KJT of stride B to a KeyedTensor [B, width].

Both kinds keep that contract, so the model never asks which one it was given. `bag` sums the ids of a bag,
however many there are. `sequence` looks every id up by itself and so needs exactly one id in every bag;
sharded row-wise it sends each row once, where bags send a partial sum from every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from embeddings.groups import TableGroup, TableSpec

_DATA_TYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16}
_TABLES_OF = {"bag": "embedding_bags", "sequence": "embeddings"}


def first_rows_come_later(weight: Tensor) -> Tensor:
    """What TorchRec is to draw first weights by: `shard` gives rows theirs, or a checkpoint does."""
    return weight


def _described(group: TableGroup) -> list[dict[str, Any]]:
    """What TorchRec is told of each table, whatever the kind."""
    return [
        {
            "name": group.table_name(table),
            "num_embeddings": table.rows,
            "embedding_dim": table.dim,
            "feature_names": [table.key],
            "data_type": _DATA_TYPES[group.dtype],
            "init_fn": first_rows_come_later,
        }
        for table in group.all_tables
    ]


class BagCollection(EmbeddingBagCollection):  # type: ignore[misc]
    """An `EmbeddingBagCollection` that knows its group; bags may hold any number of ids."""

    def __init__(self, group: TableGroup, device: torch.device) -> None:
        tables = [EmbeddingBagConfig(**table, pooling=PoolingType.SUM) for table in _described(group)]
        super().__init__(tables=tables, device=device)
        self.group = group

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """KJT of stride B -> KeyedTensor [B, widths of all tables], float32 whatever they hold."""
        found = super().forward(features)
        return KeyedTensor(found.keys(), found.length_per_key(), found.values().float())


class SequenceCollection(EmbeddingCollection):  # type: ignore[misc]
    """An `EmbeddingCollection` behind the contract of a bag collection; every bag must hold one id.

    All tables have the same width, which TorchRec demands of this kind.
    """

    def __init__(self, group: TableGroup, device: torch.device) -> None:
        tables = [EmbeddingConfig(**table) for table in _described(group)]
        super().__init__(tables=tables, device=device)
        self.group = group

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """KJT of stride B with one id a bag -> KeyedTensor [B, group.width], float32."""
        return side_by_side(super().forward(features), self.group)


Collection = BagCollection | SequenceCollection


def make_collection(group: TableGroup, device: torch.device) -> Collection:
    """Compile a group. On the meta device no memory is taken; `shard` of `sharding` places the rows."""
    kinds: dict[str, type[Collection]] = {"bag": BagCollection, "sequence": SequenceCollection}
    return kinds[group.kind](group, device)


def weight_name(group: TableGroup, table: TableSpec) -> str:
    """The name of a table's weights in the state dict of its collection."""
    return f"{_TABLES_OF[group.kind]}.{group.table_name(table)}.weight"


def side_by_side(found: Mapping[str, JaggedTensor], group: TableGroup) -> KeyedTensor:
    """Vectors of single ids, one jagged tensor a feature -> KeyedTensor [B, group.width], float32."""
    values = torch.cat([found[key].values() for key in group.keys], dim=1)
    return KeyedTensor(group.keys, [table.dim for table in group.tables], values.float())
