"""Many expressions joined to one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ibis.expr import types as ir

Part = TypeVar("Part")


def balanced(parts: Sequence[Part], join: Callable[[Part, Part], Part]) -> Part:
    """All parts joined in halves, since a chain of a hundred is too deep for Ibis to compile."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return join(balanced(parts[:half], join), balanced(parts[half:], join))


def all_rows(tables: Sequence[ir.Table]) -> ir.Table:
    """The rows of tables with the same columns."""
    return balanced(tables, lambda left, right: left.union(right))
