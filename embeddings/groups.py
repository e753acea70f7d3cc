"""Table groups: sets of embedding tables that share one optimizer and compile to one collection.

A group holds one table a feature. Target item and behaviors use the same table, because both sides
arrive under the same key of one KeyedJaggedTensor (see `trainer.data.batch`). Which group serves which
role (attention or representation, target or behavior) is the model's business, not the group's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from embeddings.errors import ConfigError
from embeddings.first_rows import FirstWeights, table_seed
from embeddings.optimizers import FusedOptimizer


@dataclass(frozen=True)
class TableSpec:
    """One embedding table: the ids of one feature, `rows` of them, each a vector of `dim` floats.

    `set` names the set that it belongs to, see `EmbeddingSet`; `lane` the task whose lane it is, see
    `EmbeddingSet.losses`, empty for a group's main tables. `apart` names the ids that the table is looked up
    by, where the other tables of its feature are looked up by others.
    """

    feature: str
    rows: int
    dim: int
    set: str = ""
    lane: str = ""
    apart: str = ""

    @property
    def key(self) -> str:
        """The key of a batch that has the ids which the table is looked up by."""
        return self.apart or self.feature


@dataclass(frozen=True)
class EmbeddingSet:
    """One complete copy of a group's tables: a table for each of its features (Multi-Embedding, section 3).

    Attributes:
        name: empty where the group has one set only.
        owner: who trains it: `shared`, `task:NAME`, or `domain:ID`.
        losses: the tasks whose losses reach it, where each of these has the optimizer's state of a row to
            itself (AdaTask): the main tables are those of the first, and each of the others adds a table to
            each of them, its lane. The vector of an id is the sum of its rows. Empty: one state for all.
    """

    name: str = ""
    owner: str = "shared"
    losses: tuple[str, ...] = ()

    @property
    def lanes(self) -> tuple[str, ...]:
        """The tasks that add tables of their own."""
        return self.losses[1:]


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
        like: the group whose tables of the same features begin with the same random numbers; empty: its own.
        sharding: sharding types the planner may use; empty means the device's default set.
        kind: `bag` or `sequence`, see `embeddings.lookup.compile`.
        dtype: `fp32` or `fp16`, what the rows are kept in; lookups give float32 and state is float32.
        stochastic_rounding: whether an updated row becomes fp16 at random, in proportion, instead of to
            nearest; None = on a GPU, as FBGEMM's kernels do by default. A CPU rounds to nearest.
        sets: in the order of their tables. Those may have lanes, see `EmbeddingSet.losses`.
        given: its rows come from elsewhere, and nothing trains them.
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
    like: str = ""
    given: bool = False

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

    @cached_property
    def lanes(self) -> tuple[str, ...]:
        """The tasks that add tables of their own to some set."""
        return tuple(dict.fromkeys(task for each in self.sets for task in each.lanes))

    def sets_with(self, task: str) -> list[str]:
        """The names of the sets that a task adds a lane to."""
        return [each.name for each in self.sets if task in each.lanes]

    def lane(self, task: str) -> tuple[TableSpec, ...]:
        """The tables of a task's lane: one for each main table of these sets, in their order."""
        return tuple(
            replace(table, lane=task) for name in self.sets_with(task) for table in self._tables_of(name)
        )

    @cached_property
    def all_tables(self) -> tuple[TableSpec, ...]:
        """The main tables, then those of each lane."""
        return self.tables + sum((self.lane(task) for task in self.lanes), ())

    @cached_property
    def keys(self) -> list[str]:
        """One for each table, in their order: the names in a KeyedTensor.

        TorchRec adds the table's name to a feature that several tables of a collection look up.
        """
        tables = self.all_tables
        if len(tables) == len(self.features):
            return [table.key for table in tables]
        return [f"{table.key}@{self.table_name(table)}" for table in tables]

    @property
    def width(self) -> int:
        """Length of the fused vector of one bag, of all sets together; lanes are added to it."""
        return sum(self._set_widths().values())

    @property
    def looked_up_width(self) -> int:
        """The same, of the fused vectors of the main tables and of all lanes together."""
        widths = self._set_widths()
        return sum(widths[each.name] * (1 + len(each.lanes)) for each in self.sets)

    def table_name(self, table: TableSpec) -> str:
        """The table's name, unique over all groups."""
        return str(TableName(self.name, table.set, table.feature, table.lane))

    def first_seed(self, seed: int, table: str) -> int:
        """The seed of a table's first weights, by its name and the seed of the run."""
        return table_seed(seed, self.like + table[len(self.name) :] if self.like else table)

    def of_set(self, name: str) -> TableGroup:
        """The group as if it had the tables of one set only; their names stay.

        Raises:
            KeyError: there is no such set.
        """
        if len(self.sets) == 1 and self.sets[0].name == name:
            return self
        for each in self.sets:
            if each.name == name:
                return replace(self, tables=self._tables_of(name), sets=(replace(each, losses=()),))
        raise KeyError(name)

    def with_keys(self, keys: Mapping[str, str], rows: Mapping[str, int]) -> TableGroup:
        """The group with other keys for the tables of some features.

        Args:
            keys: feature -> key; rows: key -> rows of tables that are looked up by it.
        """
        tables = (
            replace(table, apart=keys[table.feature], rows=rows[keys[table.feature]])
            if table.feature in keys
            else table
            for table in self.tables
        )
        return replace(self, tables=tuple(tables)) if keys else self

    def columns(self, name: str) -> slice:
        """Where the vector of a set is in the fused vector of one bag."""
        before = 0
        for each, width in self._set_widths().items():
            if each == name:
                return slice(before, before + width)
            before += width
        raise KeyError(name)

    def widths(self) -> tuple[int, ...]:
        """Widths of the parts of the fused vector: each feature's own, or the one that all share.

        Of several sets, those of one after those of the other.
        """
        return sum((self._widths_of(name) for name in self.set_names), ())

    def fuse(self, vector_BD: Tensor) -> Tensor:
        """The vectors of all main tables side by side, [B, sum of dims] -> [B, width]."""
        return self._fused(vector_BD, self.set_names)

    def fuse_lanes(self, vector_BD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The vectors of all tables side by side -> [B, width] of the main ones, and of each task's lane.

        A lane's are the columns of the sets that have it, side by side; see `lane_columns`.
        """
        if not self.lanes:
            return self.fuse(vector_BD), {}
        widths = [sum(table.dim for table in tables) for tables in (self.tables, *map(self.lane, self.lanes))]
        main, *lanes = vector_BD.split(widths, dim=1)
        fused = {
            task: self._fused(part, self.sets_with(task))
            for task, part in zip(self.lanes, lanes, strict=True)
        }
        return self.fuse(main), fused

    def add_lanes(self, vector_BD: Tensor, lanes: Mapping[str, Tensor]) -> Tensor:
        """Add what `fuse_lanes` gives of lanes to fused vectors [B, width] of the main tables."""
        if not lanes:
            return vector_BD
        parts = self.by_set(vector_BD)
        for task, lane_BD in lanes.items():
            names = self.sets_with(task)
            widths = [parts[name].shape[1] for name in names]
            for name, part in zip(names, lane_BD.split(widths, dim=1), strict=True):
                parts[name] = parts[name] + part
        return side_by_side(list(parts.values()))

    def lane_columns(self, task: str, vector_BD: Tensor) -> Tensor:
        """The columns of the sets that have a task's lane, of fused vectors [B, width]."""
        parts = self.by_set(vector_BD)
        return side_by_side([parts[name] for name in self.sets_with(task)])

    def by_set(self, vector_BD: Tensor) -> dict[str, Tensor]:
        """The vectors of each set, of fused vectors [B, width]."""
        widths = self._set_widths()
        return dict(zip(widths, vector_BD.split(list(widths.values()), dim=1), strict=True))

    def _set_widths(self) -> dict[str, int]:
        return {name: sum(self._widths_of(name)) for name in self.set_names}

    def _widths_of(self, name: str) -> tuple[int, ...]:
        dims = tuple(table.dim for table in self._tables_of(name))
        return dims[:1] if self.fusion == "sum" else dims

    def _fused(self, vector_BD: Tensor, names: list[str]) -> Tensor:
        """The vectors of the tables of some sets, of which one vector a set is made."""
        if self.fusion == "concat":
            return vector_BD
        sets = [self.of_set(name).tables for name in names]
        parts = vector_BD.split([sum(table.dim for table in tables) for tables in sets], dim=1)
        fused = [
            part.unflatten(1, (len(tables), -1)).sum(1) for part, tables in zip(parts, sets, strict=True)
        ]
        return side_by_side(fused)

    def _tables_of(self, name: str) -> tuple[TableSpec, ...]:
        return tuple(table for table in self.tables if table.set == name)


def with_lanes(
    groups: Mapping[str, TableGroup], losses_of: Callable[[str], Sequence[str]]
) -> dict[str, TableGroup]:
    """Groups as they are trained. `losses_of`: owner of a set -> see `EmbeddingSet.losses`."""
    return {
        name: replace(
            group, sets=tuple(replace(each, losses=tuple(losses_of(each.owner))) for each in group.sets)
        )
        for name, group in groups.items()
    }


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Vectors [B, *] as one; the only one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


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
