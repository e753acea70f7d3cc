"""Initial weights that depend on the seed, the table, the row and the column, and on nothing else.

However the rows are sharded, and whichever rank holds them, row 17 of a table starts with the same bits.
That is what makes "two ranks equal one" and "sharded equals unsharded" exact from the first step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FirstKind = Literal["uniform", "normal"]
# A distribution's scale where nobody gives one. Vectors that are scored begin as `normal`: with 0.25 the
# vectors of one id in four tables of width 16 have a score of 0.5 and others one of 0 +- 0.06.
FIRST_SCALES: dict[FirstKind, float] = {"uniform": 0.05, "normal": 0.25}
_MASK = 0xFFFFFFFF
_ROWS_AT_ONCE = 1 << 16


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser held in int64 (products stay below 2**63, so nothing overflows)."""
    for _ in range(2):
        x = (x >> 16).bitwise_xor_(x).mul_(0x45D9F3B).bitwise_and_(_MASK)
    return (x >> 16).bitwise_xor_(x)


def table_seed(seed: int, table: str) -> int:
    """A 32-bit seed for one table; distinct names give unrelated streams."""
    digest = hashlib.sha256(f"{seed}:{table}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


@dataclass(frozen=True)
class FirstWeights:
    """The distribution of a table's first weights.

    Attributes:
        kind: `uniform` in [-scale, scale), or `normal` with mean 0 and deviation `scale`.
    """

    kind: FirstKind = "uniform"
    scale: float = FIRST_SCALES["uniform"]


def initial_rows_(
    weight: Tensor, seed: int, first: FirstWeights, row_offset: int = 0, column_offset: int = 0
) -> Tensor:
    """Fill a shard of a table in place with its first weights.

    Args:
        weight: [rows, columns] of a shard.
        seed: the table's seed, see `table_seed`.
        first: their distribution.
        row_offset, column_offset: where the shard lies in the whole table.

    Returns:
        The same tensor.
    """
    columns = torch.arange(weight.shape[1], device=weight.device, dtype=torch.int64) + column_offset
    with torch.no_grad():
        for start in range(0, weight.shape[0], _ROWS_AT_ONCE):
            stop = min(start + _ROWS_AT_ONCE, weight.shape[0])
            rows = torch.arange(start, stop, device=weight.device, dtype=torch.int64) + row_offset
            weight[start:stop] = _values(rows, columns, seed, first).to(weight.dtype)
    return weight


def initial_rows_at_(
    weight: Tensor,
    rows: Tensor,
    seed: int,
    first: FirstWeights,
    row_offset: int = 0,
    column_offset: int = 0,
) -> Tensor:
    """Give some rows of a shard their first weights again, in place; the others stay.

    Args:
        rows: int64 [n] on the shard's device, where the shard's first row is 0; the others as in
            `initial_rows_`.

    Returns:
        The same tensor.
    """
    columns = torch.arange(weight.shape[1], device=weight.device, dtype=torch.int64) + column_offset
    with torch.no_grad():
        for part in rows.split(_ROWS_AT_ONCE):
            weight[part] = _values(part + row_offset, columns, seed, first).to(weight.dtype)
    return weight


def _values(rows: Tensor, columns: Tensor, seed: int, first: FirstWeights) -> Tensor:
    """float32 [rows, columns], by the numbers of rows and columns in the whole table."""
    row_key = _mix(_mix(rows & _MASK ^ seed) + (rows >> 32) & _MASK)
    column_key = _mix(columns + 0x9E3779B9 & _MASK)
    bits = _mix(row_key[:, None] ^ column_key[None, :])
    bits = bits >> 8  # 24 random ones are left
    if first.kind == "uniform":
        values = bits.to(torch.float32) * 2.0**-24 * 2 - 1
    else:
        # In double precision, so that rounding does not depend on where in a shard a value lies.
        symmetric = (bits.to(torch.float64) + 0.5) * 2.0**-23 - 1
        values = (torch.erfinv(symmetric) * 2**0.5).to(torch.float32)
    return values * first.scale
