"""The part of a model that a retrieval service wants: the vectors whose dot products are stage one's scores.

A behavior's vector is a linear function of its features' rows, so it is the concatenation (or, behind a
projection to heads, the sum) of one part a feature, and each part is a row of a matrix that is computed once
at export: the attention row times that feature's part of the key projection. Combinations of features need
no matrix of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from embeddings.groups import TableGroup
from trainer.model.settings import BranchConfig
from trainer.run_config import Config
from trainer.snapshot.manifest import SearchPart


@dataclass(frozen=True)
class Part:
    """One matrix to write: a table's rows [rows, width], times `projection` [width, dim] if there is one."""

    side: Literal["key", "query"]
    group: str
    feature: str
    rows: int
    dim: int
    projection: Tensor | None

    def of(self, rows: Tensor) -> Tensor:
        return rows.float() if self.projection is None else rows.float() @ self.projection


def search_parts(
    config: Config, groups: Mapping[str, TableGroup], dense: Mapping[str, Tensor]
) -> dict[str, tuple[SearchPart, list[Part]]]:
    """For each branch what describes its search (without tables), and the matrices that belong to it.

    Args:
        dense: the dense part of the model's state dict.
    """
    by_branch: dict[str, tuple[SearchPart, list[Part]]] = {}
    for name, settings in config.model.all_branches().items():
        reason = _why_none(settings) or _why_summed(settings, groups)
        if reason:
            by_branch[name] = SearchPart(reason=reason), []
            continue
        weights = {
            side: _projection(settings, dense, f"branches.{name}", side, groups) for side in ("query", "key")
        }
        parts = _of_side("key", settings.roles.attention_behavior, settings, groups, weights["key"])
        if weights["key"] or settings.roles.attention_target != settings.roles.attention_behavior:
            parts += _of_side("query", settings.roles.attention_target, settings, groups, weights["query"])
        summed = _mixes(settings)
        keys = [part.dim for part in parts if part.side == "key"]
        width = keys[0] if summed else sum(keys)
        heads = 1 if settings.search_kind.own_scorer else settings.heads
        scale = max(width // heads, 1) ** -0.5
        by_branch[name] = SearchPart(combine="sum" if summed else "concat", heads=heads, scale=scale), parts
    return by_branch


def _why_none(settings: BranchConfig) -> str:
    """Why stage one of a branch is no maximum inner product over stored vectors; empty if it is."""
    if not settings.searches:
        return f'sequence = "{settings.sequence}" searches nothing'
    obstacle = settings.search_kind.export_obstacle(settings)
    return obstacle or ("it attends to no feature" if settings.attend == () else "")


def _why_summed(settings: BranchConfig, groups: Mapping[str, TableGroup]) -> str:
    """The same for groups that add their features' rows up."""
    roles = settings.roles
    added = [n for n in (roles.attention_target, roles.attention_behavior) if groups[n].fusion == "sum"]
    return f'group {added[0]} has fusion = "sum"' if added else ""


def _mixes(settings: BranchConfig) -> bool:
    """Whether one projection takes all features together."""
    return bool(settings.search_kind.own_scorer) or settings.projection == "heads"


def _attended(settings: BranchConfig, group: TableGroup) -> list[str]:
    return group.features if settings.attend is None else list(settings.attend)


def _projection(
    settings: BranchConfig,
    dense: Mapping[str, Tensor],
    branch: str,
    side: str,
    groups: Mapping[str, TableGroup],
) -> list[Tensor]:
    """The map of each attended feature, [width, dim]; empty if vectors are compared as they are."""
    group = groups[settings.roles.attention_behavior]
    features = _attended(settings, group)
    if _mixes(settings):
        owner = settings.search_kind.own_scorer or "scorer"
        widths = {table.feature: table.dim for table in group.tables}
        whole = dense[f"{branch}.{owner}.{side}.weight"]
        return [part.T for part in whole.split([widths[feature] for feature in features], dim=1)]
    if settings.projection == "feature":
        return [dense[f"{branch}.scorer.{side}.maps.{i}.weight"].T for i in range(len(features))]
    return []


def _of_side(
    side: Literal["key", "query"],
    name: str,
    settings: BranchConfig,
    groups: Mapping[str, TableGroup],
    weights: list[Tensor],
) -> list[Part]:
    group = groups[name]
    tables = {table.feature: table for table in group.tables}
    parts = []
    for place, feature in enumerate(_attended(settings, group)):
        table, weight = tables[feature], weights[place] if weights else None
        dim = table.dim if weight is None else weight.shape[1]
        parts.append(Part(side, name, feature, table.rows, dim, weight))
    return parts
