"""Sizes of a branch's modules: what settings, table groups and the log say of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from embeddings.groups import TableGroup
from trainer.config.model import BranchKeys
from trainer.model.time import AGE_BUCKETS, TimeBias, TimeEncoding
from trainer.model.time_vectors import EncodingBias, TimeColumns, TimeVectors, VectorBias


@dataclass(frozen=True)
class Dimensions:
    """What the sizes of a model follow from besides its settings.

    Attributes:
        groups: the resolved table groups; history_length: L; levels: of the hard search while reading.
        seed: of fixed random projections; domains: ids that a domain may have, 0 where there is none.
    """

    groups: Mapping[str, TableGroup]
    history_length: int
    levels: int
    seed: int
    domains: int = 0


class BranchSizes:
    """What the modules of a branch are built from, besides its settings.

    Args:
        settings: of the branch; newest: behaviors that its windows are cut to, 0 = whole windows.
        dimensions: of the model; of_set: the name of the set of the representation.

    Attributes:
        attended, width: widths of the attended features, and their sum.
        columns: of the attended features in the attention vectors; None = all.
        representation: the group of the behaviors' representation, with the tables of the set alone.
        cross_values: width of the cross features that are a part of values.
        seed: of fixed random projections; longest: most behaviors of a window.
    """

    def __init__(self, settings: BranchKeys, newest: int, dimensions: Dimensions, of_set: str = "") -> None:
        self.settings, self.dimensions = settings, dimensions
        attention = dimensions.groups[settings.roles.attention_behavior]
        self.attended = attention.widths()
        self.columns: list[slice] | None = None
        if settings.attend is not None:
            ends = accumulate(table.dim for table in attention.tables)
            tables = zip(attention.tables, ends, strict=True)
            columns = {table.feature: slice(end - table.dim, end) for table, end in tables}
            self.columns = [columns[feature] for feature in settings.attend]
            self.attended = tuple(part.stop - part.start for part in self.columns)
        self.width = sum(self.attended)
        self.representation = dimensions.groups[settings.roles.representation_behavior].of_set(of_set)
        cross = settings.roles.cross if "values" in settings.cross_in else ""
        self.cross_values = dimensions.groups[cross].width if cross else 0
        self.seed, self.longest = dimensions.seed, newest or dimensions.history_length

    def target_groups(self) -> int:
        """G: rows of the feature that groups the targets."""
        if not self.settings.time_group:
            return 1
        tables = [table for group in self.dimensions.groups.values() for table in group.tables]
        return max(table.rows for table in tables if table.feature == self.settings.time_group)

    def encoding(self) -> TimeEncoding:
        """Time encodings of the representation."""
        settings, rows = self.settings, self.mark_rows("values")
        if settings.time == "concat" and rows:
            vectors = self._vectors("representation_target"), self._vectors("representation_behavior")
            return TimeColumns(*vectors, projected=settings.projection == "feature")
        return self._of_values if self.shares_time else self._encoding("values", self.representation.width)

    def score_time(self) -> tuple[TimeBias | None, TimeEncoding | None, bool]:
        """How time enters scores: as a bias, or as encodings, and whether these are those of the values."""
        settings, rows = self.settings, self.mark_rows("scores")
        if not rows:
            return None, None, False
        if settings.time == "concat":
            vectors = self._vectors("attention_target"), self._vectors("attention_behavior")
            return VectorBias(*vectors, projected=settings.projection == "feature"), None, False
        if settings.time == "encoding":
            return (
                None,
                self._of_values if self.shares_time else self._encoding("scores", self.width),
                self.shares_time,
            )
        if self.shares_time:
            return EncodingBias(self._of_values, self.representation.width), None, False
        return TimeBias(rows, settings.time_target, self.target_groups(), settings.time_dim), None, False

    @property
    def shares_time(self) -> bool:
        """Whether scores read the tables of the values' encodings: one group serves all four roles."""
        settings = self.settings
        served = self.time_owners("scores") | self.time_owners("values")
        both = {"scores", "values"} <= set(settings.time_in)
        return settings.time_tables == "group" and settings.time != "concat" and both and len(served) == 1

    @cached_property
    def _of_values(self) -> TimeEncoding:
        return self._encoding("values", self.representation.width)

    def _encoding(self, stage: str, width: int) -> TimeEncoding:
        return TimeEncoding(self.mark_rows(stage), width, self.settings.time_target, self.target_groups())

    @cached_property
    def time_vectors(self) -> dict[str, TimeVectors]:
        """Those of `time = "concat"`, by table group or by stage; filled in as modules are built."""
        return {}

    def time_owners(self, stage: str) -> set[str]:
        """Whose `time_vectors` a stage reads."""
        roles = self.settings.roles
        if self.settings.time_tables == "stage":
            return {f"of_{stage}"}
        if stage == "scores":
            return {roles.attention_target, roles.attention_behavior}
        return {roles.representation_target, roles.representation_behavior}

    def _vectors(self, role: str) -> TimeVectors:
        """Those of a role; made once."""
        stage = "scores" if role.startswith("attention") else "values"
        of_group = self.settings.time_tables == "group"
        name = getattr(self.settings.roles, role) if of_group else f"of_{stage}"
        if name not in self.time_vectors:
            self.time_vectors[name] = TimeVectors(self.mark_rows(stage), self.settings.time_dim)
        return self.time_vectors[name]

    def mark_rows(self, stage: str) -> dict[str, int]:
        """Rows of the tables of position, age and level, as far as a stage uses them."""
        settings = self.settings
        if stage not in settings.time_in:
            return {}
        rows = {"position": self.longest + 1, "age": AGE_BUCKETS, "level": self.dimensions.levels + 1}
        return {name: count for name, count in rows.items() if getattr(settings, name)}
