"""Vectors of position, age and level that scores and values have in common, and what both make of them.

`trainer.model.time` has the forms in which each stage has tables of its own. Here one stage reads the tables
of the other. A parameter is registered once, with whoever owns it; whoever borrows it (`borrow`) uses it
under no name, so that a checkpoint has it once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.time import Marks, MarkTables, TimeBias, TimeEncoding

# First vectors: of two that are zero, neither would get a gradient of their product.
_SPREAD = 0.1


def borrow(module: nn.Module, name: str, other: Any) -> None:
    """Let a module read another one as `module.name`, without its parameters becoming the module's own."""
    object.__setattr__(module, name, other)


class TimeVectors(MarkTables):
    """A vector for every value of each mark, [rows, dim]; all values 0 are the target's own."""

    def __init__(self, rows: Mapping[str, int], dim: int) -> None:
        super().__init__(rows, "shared", 1)
        self.dim = dim
        self.tables = nn.ParameterDict(
            {n: nn.Parameter(torch.randn(r, dim) * _SPREAD) for n, r in rows.items()}
        )


class BorrowedBias(TimeBias):
    """A score of marks whose tables are others'; `scalars` has it for every value of a mark."""

    def most(self) -> float:
        return sum(float(self.scalars(name).abs().max()) for name in self.rows)


class EncodingBias(BorrowedBias):
    """The score of the encodings alone: <t, p> / sqrt(D), with the encodings t and p of target and behavior.

    It is what TIN's score has of time where the features' vectors are left out. The tables are those of the
    values' encodings.
    """

    encoding: TimeEncoding

    def __init__(self, encoding: TimeEncoding, width: int) -> None:
        MarkTables.__init__(self, encoding.rows, encoding.form, encoding.groups)
        self.dim = width
        borrow(self, "encoding", encoding)
        with torch.no_grad():
            for parameter in encoding.parameters():
                parameter.normal_(0.0, _SPREAD)

    def scalars(self, name: str) -> Tensor:
        table: Tensor = self.encoding.tables[name]
        group_G = torch.arange(self.groups, device=table.device)
        target_GD: Tensor = self.encoding.target(table.new_zeros(self.groups, self.dim), group_G)
        target_GD = target_GD * self.dim**-0.5
        if self.form == "target":
            return (target_GD @ table.T).reshape(-1)
        # Not a matrix product: rows of one value are equal wherever they lie.
        behavior_GMD = table.view(-1, self.rows[name], self.dim)
        return (behavior_GMD * target_GD[: behavior_GMD.shape[0], None]).sum(2).reshape(-1)


class VectorBias(BorrowedBias):
    """The score of vectors that stand beside the features': <q[0], k[mark]> / sqrt(dim), each mark by itself.

    DARE's code: the target is always at mark 0, so this is a scalar a rank; it is trained as a product here.

    Args:
        target, behavior: tables of the query's and of the key's side; projected: each side maps them.
    """

    vectors: tuple[TimeVectors, TimeVectors]

    def __init__(self, target: TimeVectors, behavior: TimeVectors, *, projected: bool) -> None:
        MarkTables.__init__(self, behavior.rows, "shared", 1)
        self.dim = behavior.dim
        borrow(self, "vectors", (target, behavior))
        self.query, self.key = (_maps(behavior) if projected else None for _ in range(2))

    def scalars(self, name: str) -> Tensor:
        target, behavior = self.vectors
        query_D = _mapped(self.query, name, target.tables[name][:1])
        key_MD = _mapped(self.key, name, behavior.tables[name])
        scalar_M: Tensor = (key_MD * (query_D * self.dim**-0.5)).sum(1)
        return scalar_M


class TimeColumns(TimeEncoding):
    """Vectors of marks beside the vectors of target and behaviors, instead of added to them (DARE's code).

    Args:
        target, behavior: tables of each side; projected: each side maps them.
    """

    vectors: tuple[TimeVectors, TimeVectors]

    def __init__(self, target: TimeVectors, behavior: TimeVectors, *, projected: bool) -> None:
        MarkTables.__init__(self, behavior.rows, "shared", 1)
        self.columns = behavior.dim * len(behavior.rows)
        borrow(self, "vectors", (target, behavior))
        self.of_target, self.of_value = (_maps(behavior) if projected else None for _ in range(2))

    def target(self, target_CD: Tensor, group_C: Tensor, beside: Sequence[TimeEncoding] = ()) -> Tensor:
        own = [_mapped(self.of_target, n, self.vectors[0].tables[n][:1]) for n in self.rows]
        return torch.cat([target_CD, *(each.expand(target_CD.shape[0], -1) for each in own)], dim=1)

    def pooled(
        self,
        pooled_CD: Tensor,
        weight_CK: Tensor,
        marks: Marks,
        group_C: Tensor,
        *,
        many: bool = False,
        beside: Sequence[TimeEncoding] = (),
    ) -> Tensor:
        parts = [pooled_CD]
        for name in self.rows:
            table = self.vectors[1].tables[name]
            summed_CD = self._summed(table, marks.index(name), weight_CK, many=many)
            parts.append(_mapped(self.of_value, name, summed_CD))
        return torch.cat(parts, dim=1)


def _maps(vectors: TimeVectors) -> nn.ModuleDict:
    """A bias-free map for each mark."""
    return nn.ModuleDict({name: nn.Linear(vectors.dim, vectors.dim, bias=False) for name in vectors.rows})


def _mapped(maps: nn.ModuleDict | None, name: str, vector_MD: Tensor) -> Tensor:
    """The map of one mark, if there are any."""
    if maps is None:
        return vector_MD
    mapped: Tensor = maps[name](vector_MD)
    return mapped
