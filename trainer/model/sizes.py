"""Sizes of a branch's modules: what settings, table groups and the log say of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from embeddings.groups import TableGroup
from trainer.config.model import BranchKeys
from trainer.model.time import AGE_BUCKETS, TimeEncoding


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
        self.seed, self.longest = dimensions.seed, newest or dimensions.history_length

    def target_groups(self) -> int:
        """G: rows of the feature that groups the targets."""
        if not self.settings.time_group:
            return 1
        tables = [table for group in self.dimensions.groups.values() for table in group.tables]
        return max(table.rows for table in tables if table.feature == self.settings.time_group)

    def encoding(self) -> TimeEncoding:
        """Time encodings of the representation."""
        rows, width = self.mark_rows("values"), self.representation.width
        return TimeEncoding(rows, width, self.settings.time_target, self.target_groups())

    def mark_rows(self, stage: str) -> dict[str, int]:
        """Rows of the tables of position, age and level, as far as a stage uses them."""
        settings = self.settings
        if stage not in settings.time_in:
            return {}
        rows = {"position": self.longest + 1, "age": AGE_BUCKETS, "level": self.dimensions.levels + 1}
        return {name: count for name, count in rows.items() if getattr(settings, name)}
