"""Table groups: sets of embedding tables that share one optimizer and compile to one collection.

A group holds one table a feature. Target item and behaviors use the same table, because both sides
arrive under the same key of one KeyedJaggedTensor (see `trainer.data.batch`). Which group serves which
role (attention or representation, target or behavior) is the model's business, not the group's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from embeddings.errors import ConfigError
from embeddings.first_rows import FirstWeights
from embeddings.optimizers import FusedOptimizer


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
        kind: `bag` or `sequence`, see `embeddings.lookup.compile`.
        dtype: `fp32` or `fp16`, what the rows are kept in; lookups give float32 and state is float32.
        stochastic_rounding: whether an updated row becomes fp16 at random, in proportion, instead of to
            nearest; None = on a GPU, as FBGEMM's kernels do by default. A CPU rounds to nearest.
    """

    name: str
    tables: tuple[TableSpec, ...]
    optimizer: FusedOptimizer = field(default_factory=FusedOptimizer)
    first: FirstWeights = field(default_factory=FirstWeights)
    sharding: tuple[str, ...] = ()
    kind: str = "bag"
    dtype: str = "fp32"
    fusion: Literal["concat", "sum"] = "concat"
    stochastic_rounding: bool | None = None

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
