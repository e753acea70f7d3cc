"""Table groups: sets of embedding tables that share one optimizer and compile to one collection.

A group holds one table a feature. Target item and behaviors use the same table, because both sides
arrive under the same key of one KeyedJaggedTensor (see `trainer.data.batch`). Which group serves which
role (attention or representation, target or behavior) is the model's business, not the group's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from embeddings.errors import ConfigError
from embeddings.init import FirstWeights


@dataclass(frozen=True)
class FusedOptimizer:
    """How the rows of a group are updated inside the backward pass.

    Attributes:
        name: `rowwise_adagrad` (one accumulator a row), `adagrad` (one a weight) or `sgd`.
        learning_rate: step size before any schedule.
        eps: added to the root of the accumulator; unused by `sgd`.
    """

    name: str = "rowwise_adagrad"
    learning_rate: float = 0.05
    eps: float = 1e-8


@dataclass(frozen=True)
class TableSpec:
    """One embedding table: the ids of one feature, `rows` of them, each a vector of `dim` floats."""

    feature: str
    rows: int
    dim: int


@dataclass(frozen=True)
class TableGroup:
    """A named set of tables.

    Attributes:
        name: the group's name in the config, part of every table's name.
        tables: one per feature, in the order in which their vectors are concatenated.
        fusion: how these vectors become one: `concat`, or their `sum` (tables of one width).
        optimizer: the fused optimizer of all its rows.
        first: the distribution of the first weights.
        sharding: sharding types the planner may use; empty means the device's default set.
    """

    name: str
    tables: tuple[TableSpec, ...]
    optimizer: FusedOptimizer = FusedOptimizer()
    first: FirstWeights = field(default_factory=FirstWeights)
    sharding: tuple[str, ...] = ()
    fusion: Literal["concat", "sum"] = "concat"

    def __post_init__(self) -> None:
        if self.fusion == "sum" and len({table.dim for table in self.tables}) > 1:
            dims = ", ".join(f"{table.feature} {table.dim}" for table in self.tables)
            raise ConfigError(f'groups.{self.name}: fusion = "sum" needs tables of one width, not {dims}')

    @property
    def features(self) -> list[str]:
        return [table.feature for table in self.tables]

    @property
    def width(self) -> int:
        """Length of the fused vector of one bag."""
        return sum(self.widths())

    def table_name(self, feature: str) -> str:
        """The table's name, unique over all groups."""
        return f"{self.name}__{feature}"

    def widths(self) -> tuple[int, ...]:
        """Widths of the parts of the fused vector: each feature's own, or the one that all share."""
        dims = tuple(table.dim for table in self.tables)
        return dims[:1] if self.fusion == "sum" else dims

    def fuse(self, vector_BD: Tensor) -> Tensor:
        """The features' vectors side by side, [B, sum of dims] -> [B, width]."""
        if self.fusion == "concat":
            return vector_BD
        fused: Tensor = vector_BD.unflatten(1, (len(self.tables), -1)).sum(1)
        return fused


def bag_collection(group: TableGroup, device: torch.device) -> EmbeddingBagCollection:
    """Compile a group to an `EmbeddingBagCollection`: KJT of stride B -> KeyedTensor [B, sum of dims].

    On the meta device no memory is taken; `embeddings.sharding.shard` then places the rows.
    """
    return EmbeddingBagCollection(
        device=device,
        tables=[
            EmbeddingBagConfig(
                name=group.table_name(table.feature),
                num_embeddings=table.rows,
                embedding_dim=table.dim,
                feature_names=[table.feature],
                pooling=PoolingType.SUM,
            )
            for table in group.tables
        ],
    )


def table_group(
    name: str,
    features: Sequence[str],
    dims: Mapping[str, int],
    rows: Mapping[str, int],
    optimizer: FusedOptimizer,
    first: FirstWeights,
    sharding: Sequence[str],
    fusion: Literal["concat", "sum"] = "concat",
) -> TableGroup:
    """Build a group from per-feature widths and row counts."""
    tables = tuple(TableSpec(feature, rows[feature], dims[feature]) for feature in features)
    return TableGroup(name, tables, optimizer, first, tuple(sharding), fusion)
