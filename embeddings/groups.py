"""Table groups: sets of embedding tables that share one optimizer and compile to one collection.

A group holds one table a feature. Target item and behaviors use the same table, because both sides
arrive under the same key of one KeyedJaggedTensor (see `trainer.data.batch`). Which group serves which
role (attention or representation, target or behavior) is the model's business, not the group's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from embeddings.errors import ConfigError
from embeddings.first_rows import FirstWeights
from embeddings.optimizers import FusedOptimizer


@dataclass(frozen=True)
class TableSpec:
    """One embedding table: the ids of one feature, `rows` of them, each a vector of `dim` floats.

    `set` names the set that it belongs to, see `EmbeddingSet`; `lane` the task whose lane it is, see
    `TableGroup.lanes`, empty for a group's main tables.
    """

    feature: str
    rows: int
    dim: int
    set: str = ""
    lane: str = ""


@dataclass(frozen=True)
class EmbeddingSet:
    """One complete copy of a group's tables: a table for each of its features (Multi-Embedding, section 3).

    Attributes:
        name: empty where the group has one set only.
        owner: who trains it: `shared`, `task:NAME`, or `domain:ID`.
    """

    name: str = ""
    owner: str = "shared"


@dataclass(frozen=True)
class TableGroup:
    """A named set of tables.

    Attributes:
        name: the group's name in the config, part of every table's name.
        tables: one per feature, in the order in which their vectors are concatenated; where there are several
            sets, all of one set, then all of the next, with the same features in the same order.
        fusion: how the vectors of a set become one: `concat`, or their `sum` (tables of one width).
        optimizer: the fused optimizer of all its rows.
        first: the distribution of the first weights.
        sharding: sharding types the planner may use; empty means the device's default set.
        kind: `bag` or `sequence`, see `embeddings.lookup.compile`.
        dtype: `fp32` or `fp16`, what the rows are kept in; lookups give float32 and state is float32.
        stochastic_rounding: whether an updated row becomes fp16 at random, in proportion, instead of to
            nearest; None = on a GPU, as FBGEMM's kernels do by default. A CPU rounds to nearest.
        sets: in the order of their tables.
        lanes: tasks that add a table of their own to each main one (AdaTask): the vector of an id is the sum
            of its main row and of those of all lanes, so that each task has the optimizer's state of a row to
            itself. The main tables are those of one more task, the first. A set that a task owns has none.
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
    sets: tuple[EmbeddingSet, ...] = (EmbeddingSet(),)
    lanes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # A vector of a bag is cut into those of the sets by this order, and manifests come from anywhere.
        of_sets = [self._tables_of(each.name) for each in self.sets]
        features = [[table.feature for table in tables] for tables in of_sets]
        if self.tables != sum(of_sets, ()) or any(each != features[0] for each in features):
            raise ConfigError(
                f"groups.{self.name}: each of its sets ({', '.join(self.set_names)}) must have a table of "
                "every feature, one set after the other, the features in one order"
            )
        for tables in of_sets:
            if self.fusion == "sum" and len({table.dim for table in tables}) > 1:
                dims = ", ".join(f"{table.feature} {table.dim}" for table in tables)
                raise ConfigError(f'groups.{self.name}: fusion = "sum" needs tables of one width, not {dims}')

    @property
    def features(self) -> list[str]:
        """Each feature once, in the order of the tables of a set."""
        return list(dict.fromkeys(table.feature for table in self.tables))

    @property
    def set_names(self) -> list[str]:
        return [each.name for each in self.sets]

    @property
    def shared_sets(self) -> list[str]:
        """The names of the sets that no task owns: those that have lanes, if the group has any."""
        return [each.name for each in self.sets if not each.owner.startswith("task:")]

    def lane(self, task: str) -> tuple[TableSpec, ...]:
        """The tables of a task's lane: one for each table of the shared sets, in their order."""
        return tuple(
            replace(table, lane=task) for name in self.shared_sets for table in self._tables_of(name)
        )

    @property
    def all_tables(self) -> tuple[TableSpec, ...]:
        """The main tables, then those of each lane."""
        return self.tables + sum((self.lane(task) for task in self.lanes), ())

    @property
    def keys(self) -> list[str]:
        """One for each table, in their order: the names in a KeyedTensor.

        TorchRec adds the table's name to a feature that several tables of a collection look up.
        """
        tables = self.all_tables
        if len(tables) == len(self.features):
            return [table.feature for table in tables]
        return [f"{table.feature}@{self.table_name(table)}" for table in tables]

    @property
    def width(self) -> int:
        """Length of the fused vector of one bag, of all sets together; lanes are added to it."""
        return sum(sum(self.of_set(name).widths()) for name in self.set_names)

    def table_name(self, table: TableSpec) -> str:
        """The table's name, unique over all groups."""
        return str(TableName(self.name, table.set, table.feature, table.lane))

    def of_set(self, name: str) -> TableGroup:
        """The group as if it had the tables of one set only; their names stay.

        Raises:
            KeyError: there is no such set.
        """
        if len(self.sets) == 1 and self.sets[0].name == name:
            return self
        for each in self.sets:
            if each.name == name:
                return replace(self, tables=self._tables_of(name), sets=(each,), lanes=())
        raise KeyError(name)

    def columns(self, name: str) -> slice:
        """Where the vector of a set is in the fused vector of one bag."""
        before = 0
        for each in self.set_names:
            width = self.of_set(each).width
            if each == name:
                return slice(before, before + width)
            before += width
        raise KeyError(name)

    def widths(self) -> tuple[int, ...]:
        """Widths of the parts of the fused vector: each feature's own, or the one that all share.

        Of several sets, those of one after those of the other.
        """
        if len(self.sets) > 1:
            return sum((self.of_set(name).widths() for name in self.set_names), ())
        dims = tuple(table.dim for table in self.tables)
        return dims[:1] if self.fusion == "sum" else dims

    def fuse(self, vector_BD: Tensor) -> Tensor:
        """The vectors of all main tables side by side, [B, sum of dims] -> [B, width]."""
        return self._fused(vector_BD, self.set_names)

    def fuse_lanes(self, vector_BD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The vectors of all tables side by side -> [B, width] of the main ones, and of each task's lane.

        A lane's are the columns of the shared sets, side by side; see `of_shared`.
        """
        if not self.lanes:
            return self.fuse(vector_BD), {}
        widths = [sum(table.dim for table in tables) for tables in (self.tables, *map(self.lane, self.lanes))]
        main, *lanes = vector_BD.split(widths, dim=1)
        fused = {
            task: self._fused(part, self.shared_sets) for task, part in zip(self.lanes, lanes, strict=True)
        }
        return self.fuse(main), fused

    def of_shared(self, vector_BD: Tensor) -> Tensor:
        """The columns of the shared sets of fused vectors [B, width]; the same tensor where all sets are."""
        if len(self.shared_sets) == len(self.sets):
            return vector_BD
        return torch.cat([vector_BD[:, self.columns(name)] for name in self.shared_sets], dim=1)

    def with_shared(self, vector_BD: Tensor, shared_BD: Tensor) -> Tensor:
        """The same vectors [B, width], but for the columns of the shared sets, which are given."""
        if len(self.shared_sets) == len(self.sets):
            return shared_BD
        widths = [self.of_set(name).width for name in self.shared_sets]
        given = dict(zip(self.shared_sets, shared_BD.split(widths, dim=1), strict=True))
        parts = [
            given[name] if name in given else vector_BD[:, self.columns(name)] for name in self.set_names
        ]
        return torch.cat(parts, dim=1)

    def _fused(self, vector_BD: Tensor, names: list[str]) -> Tensor:
        """The vectors of the tables of some sets, of which one vector a set is made."""
        if self.fusion == "concat":
            return vector_BD
        sets = [self.of_set(name).tables for name in names]
        parts = vector_BD.split([sum(table.dim for table in tables) for tables in sets], dim=1)
        fused = [
            part.unflatten(1, (len(tables), -1)).sum(1) for part, tables in zip(parts, sets, strict=True)
        ]
        return fused[0] if len(fused) == 1 else torch.cat(fused, dim=1)

    def _tables_of(self, name: str) -> tuple[TableSpec, ...]:
        return tuple(table for table in self.tables if table.set == name)


def with_lanes(groups: Mapping[str, TableGroup], tasks: Sequence[str]) -> dict[str, TableGroup]:
    """Groups as they are trained: with a lane for each of the tasks after the first."""
    return {
        name: replace(group, lanes=tuple(tasks[1:])) if group.shared_sets else group
        for name, group in groups.items()
    }


class TableName(NamedTuple):
    """What the name of a table says: `GROUP__FEATURE`, or `GROUP/SET/FEATURE` in one of several sets.

    That of a lane has `/TASK` behind it. `set` is empty without sets, `lane` in main tables.
    """

    group: str
    set: str
    feature: str
    lane: str = ""

    def __str__(self) -> str:
        main = f"{self.group}/{self.set}/{self.feature}" if self.set else f"{self.group}__{self.feature}"
        return f"{main}/{self.lane}" if self.lane else main

    @property
    def main(self) -> TableName:
        """That of the main table of a lane's."""
        return self._replace(lane="")

    @classmethod
    def of(cls, name: str) -> TableName | None:
        """None where no table is called that."""
        group, *rest = name.split("/")
        if len(rest) > 1:
            return cls(group, *rest) if len(rest) < 4 else None
        group, mark, feature = group.partition("__")
        return cls(group, "", feature, *rest) if mark else None
