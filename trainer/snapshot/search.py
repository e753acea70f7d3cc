"""The part of a model that a retrieval service wants: the vectors whose dot products are stage one's scores.

A behavior's vector is a linear function of its features' rows, so it is the concatenation (or, behind a
projection to heads, the sum) of one part a feature. Without a projection each part is a row of the attention
table, and that table is named, not written again. Behind one it is a row of a matrix that is computed once at
export, where that is asked for: the attention row times the feature's part of the projection. Combinations of
features need no matrix of their own. What scores in this software reads none of them: it looks rows up and
projects those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from embeddings.groups import TableGroup
from trainer.model.retrieve.score import product_scale
from trainer.model.settings import BranchConfig
from trainer.run_config import Config
from trainer.snapshot.manifest import SearchPart

# What an export writes for a retrieval service: nothing beyond the tables, or projected vectors, too.
SearchKind = Literal["none", "vectors"]
_LEFT_OUT = "its vectors are projected rows, which export writes with --search vectors"


@dataclass(frozen=True)
class Part:
    """One matrix to write: a table's rows [rows, width], times `projection` [width, dim] if there is one.

    `table` is the name of the table.
    """

    side: Literal["key", "query"]
    group: str
    table: str
    feature: str
    rows: int
    dim: int
    projection: Tensor | None

    def of(self, rows: Tensor) -> Tensor:
        return rows.float() if self.projection is None else rows.float() @ self.projection


def search_parts(
    config: Config,
    groups: Mapping[str, TableGroup],
    dense: Mapping[str, Tensor],
    kind: SearchKind = "vectors",
) -> dict[str, tuple[SearchPart, list[Part]]]:
    """For each branch what describes its search (without tables), and the matrices that belong to it.

    Args:
        dense: the dense part of the model's state dict; kind: `none` leaves projected vectors out.
    """
    by_branch: dict[str, tuple[SearchPart, list[Part]]] = {}
    for name, settings in config.model.all_branches().items():
        roles = settings.roles
        target, behavior = groups[roles.attention_target], groups[roles.attention_behavior]
        reason = _obstacle(settings, target, behavior)
        if reason:
            by_branch[name] = SearchPart(reason=reason), []
            continue
        # One projection takes all features together, so that their parts are added up.
        summed = bool(settings.search_kind.own_scorer) or settings.projection == "heads"
        parts = _parts("key", behavior, settings, summed, dense, name)
        width = parts[0].dim if summed else sum(part.dim for part in parts)
        if summed or settings.projection == "feature" or target.name != behavior.name:
            parts += _parts("query", target, settings, summed, dense, name)
        if kind == "none" and any(part.projection is not None for part in parts):
            by_branch[name] = SearchPart(reason=_LEFT_OUT), []
            continue
        own = bool(settings.search_kind.own_scorer)
        heads = 1 if own else settings.heads
        scale = product_scale(width, heads, 1.0 if own else settings.temperature)
        by_branch[name] = SearchPart(combine="sum" if summed else "concat", heads=heads, scale=scale), parts
    return by_branch


def _obstacle(settings: BranchConfig, target: TableGroup, behavior: TableGroup) -> str:
    """Why stage one of a branch is no maximum inner product over stored vectors; empty if it is."""
    if not settings.searches:
        return f'sequence = "{settings.sequence}" searches nothing'
    obstacle = settings.search_kind.export_obstacle(settings)
    if obstacle:
        return obstacle
    if settings.attend == ():
        return "it attends to no feature"
    # Such a group adds its features' rows up.
    sums = (group.name for group in (target, behavior) if group.fusion == "sum")
    return next((f'group {name} has fusion = "sum"' for name in sums), "")


def _parts(
    side: Literal["key", "query"],
    group: TableGroup,
    settings: BranchConfig,
    summed: bool,
    dense: Mapping[str, Tensor],
    branch: str,
) -> list[Part]:
    """One part for each attended feature, with its map [width, dim] if there is a projection."""
    tables = {table.feature: table for table in group.tables}
    names = group.features if settings.attend is None else settings.attend
    attended = [tables[name] for name in names]
    prefix = f"branches.{branch}.{settings.search_kind.own_scorer or 'scorer'}.{side}"
    maps: Sequence[Tensor | None] = [None] * len(attended)
    if summed:
        maps = dense[f"{prefix}.weight"].split([table.dim for table in attended], dim=1)
    elif settings.projection == "feature":
        maps = [dense[f"{prefix}.maps.{i}.weight"] for i in range(len(attended))]
    parts = []
    for table, weight in zip(attended, maps, strict=True):
        dim, projection = (table.dim, None) if weight is None else (weight.shape[0], weight.T)
        name = group.table_name(table)
        parts.append(Part(side, group.name, name, table.feature, table.rows, dim, projection))
    return parts
