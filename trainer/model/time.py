"""Target-relative time and match level: tables over a behavior's marks.

Marks are recomputed for every request, never stored as absolute times (TIN, section 3.2; DARE, section
2.2). The target itself sits at mark 0. Three forms say what a target contributes:

    shared   one table for all; the target's encoding is row 0 (TIN, DARE)
    target   the target's encoding is looked up by its group, behaviors keep the ordinary table (TdPE)
    joint    both sides use a table of their own for every target group (dPE)

Which feature groups the targets is a setting; what production systems use is not public.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.model.ops.bags import rows_at, weighted_bags
from trainer.model.ops.precision import in_single_precision
from trainer.model.ops.traced import frexp

AGE_BUCKETS = 64
# Where the second of an octave's two buckets begins, of significands from 1/2 to 1.
_HALF_AN_OCTAVE = 0.5**0.5
# Up to here a product with the whole table costs less than adding up one row a behavior.
_FEW_MARKS = 128

Form = Literal["shared", "target", "joint"]


@dataclass(frozen=True)
class Marks:
    """Target-relative places of behaviors, int32 tensors of equal shape; the target's own place is 0.

    They are as large as windows and stay until the backward pass, so they are as narrow as operators allow.

    Attributes:
        position: rank counted back from the request, 1 = newest.
        age: log-bucketed seconds before the request, see `age_bucket`.
        level: deepest taxonomy level that a hard search matched, 1 = coarsest; 0 without one.
    """

    position: Tensor
    age: Tensor
    level: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> Marks:
        return Marks(change(self.position), change(self.age), change(self.level))

    def index(self, name: str) -> Tensor:
        """One of them in int64, for operators that take nothing else; made once."""
        if name not in self._wide:
            self._wide[name] = getattr(self, name).to(torch.int64)
        return self._wide[name]

    @cached_property
    def _wide(self) -> dict[str, Tensor]:
        return {}


def no_mark(index: Tensor) -> Tensor:
    """One zero for all places of `index`: levels where no hard search was, and ages that nobody reads."""
    return torch.zeros(1, 1, dtype=torch.int32, device=index.device).expand(index.shape)


def age_bucket(seconds: Tensor) -> Tensor:
    """Ages in seconds (any shape, > 0) -> int32 buckets in [1, AGE_BUCKETS), two for every doubling.

    Bucket 63 begins at 2 ** 31 seconds.
    """
    # Not the rounded logarithm: of a power of two it may be just below the whole number on some device.
    significand, exponent = frexp(seconds.clamp(min=1).to(torch.float64))
    bucket: Tensor = 2 * exponent - (significand < _HALF_AN_OCTAVE).to(torch.int32)
    return bucket.clamp(max=AGE_BUCKETS - 1)


def group_rows(mark: Tensor, group_C: Tensor, rows: int) -> Tensor:
    """Row of (target group, mark) in a joint table of `rows` rows a group, int64; `mark` is [C, K]."""
    return group_C[:, None] * rows + mark


class MarkTables(nn.Module):
    """One table a mark, of `rows[mark]` rows; what is in them is the subclass's."""

    def __init__(self, rows: Mapping[str, int], form: Form, groups: int) -> None:
        super().__init__()
        self.rows, self.form, self.groups = dict(rows), form, groups


class TimeBias(MarkTables):
    """Additive score of a behavior's marks.

    shared: b[mark]. As the target's time id is constant, the time part of DARE's score,
    <P[0], P[p]> / sqrt(d), is one scalar a rank for every target; it is learned here directly.
    target: <T[group], P[mark]> / sqrt(d), each target group its own decay curve of rank d (TdPE).
    joint: b[group, mark] (dPE, whose <P[g, p], P[g, 0]> / sqrt(d) is again a free scalar).
    """

    def __init__(
        self, rows: Mapping[str, int], form: Form = "shared", groups: int = 1, dim: int = 16
    ) -> None:
        super().__init__(rows, form, groups)
        count = groups if form == "joint" else 1
        self.dim = dim
        if form == "target":
            self.curves = nn.ParameterDict(
                {n: nn.Parameter(torch.randn(r, dim) * 0.1) for n, r in rows.items()}
            )
            self.targets = nn.Parameter(torch.randn(groups, dim) * 0.1)
        else:
            self.tables = nn.ParameterDict({n: nn.Parameter(torch.zeros(count * r)) for n, r in rows.items()})

    @property
    def of_target(self) -> bool:
        """Whether the bias depends on the candidate besides its marks."""
        return self.form != "shared"

    def shared(self, marks: Marks) -> Tensor:
        """Bias that is the same for all targets -> float32 of the marks' shape."""
        bias = torch.zeros(marks.position.shape, device=marks.position.device)
        for name in self.rows if not self.of_target else ():
            bias = bias + rows_at(self.scalars(name), getattr(marks, name))
        return bias

    def scalars(self, name: str) -> Tensor:
        """What a mark adds: [rows] for all targets alike, or [groups * rows], see `group_rows`."""
        table: Tensor = self.tables[name] if self.form != "target" else self._curves_of_groups(name)
        return table

    def _curves_of_groups(self, name: str) -> Tensor:
        curve_GM: Tensor = self.targets @ self.curves[name].T * self.dim**-0.5
        return curve_GM.reshape(-1)

    def most(self) -> float:
        """What it may add at most."""
        if self.form != "target":
            return sum(float(table.abs().max()) for table in self.tables.values())
        rows = [self.targets, *self.curves.values()]
        target, *curves = (float(torch.linalg.vector_norm(part, dim=1).amax()) for part in rows)
        return target * sum(curves)

    def forward(self, marks: Marks, group_C: Tensor) -> Tensor:
        """The whole bias of candidates' behaviors, marks [C, K] -> float32 [C, K]."""
        if not self.of_target:
            return self.shared(marks)
        bias = torch.zeros(marks.position.shape, device=group_C.device)
        for name, count in self.rows.items():
            bias = bias + rows_at(self.scalars(name), group_rows(getattr(marks, name), group_C, count))
        return bias


class TimeEncoding(MarkTables):
    """Encodings added to target and behaviors (TIN, equation 4), from the same tables.

    The encoding of a weighted sum of behaviors is the weighted sum of their encodings, so `pooled` never
    builds one vector a behavior.

    Several sets of the representation have encodings of their own, all built alike. Where the vectors of all
    sets lie side by side, those of the others are given as `beside`: they take one pass together.

    Attributes:
        columns: how much wider vectors are with their encodings; 0, since these are added.
    """

    columns: int = 0

    def __init__(self, rows: Mapping[str, int], width: int, form: Form = "shared", groups: int = 1) -> None:
        super().__init__(rows, form, groups)
        count = groups if form == "joint" else 1
        self.tables = nn.ParameterDict(
            {n: nn.Parameter(torch.zeros(count * r, width)) for n, r in rows.items()}
        )
        self.targets = nn.Parameter(torch.zeros(groups, width)) if form == "target" and rows else None

    def target(self, target_CD: Tensor, group_C: Tensor, beside: Sequence[TimeEncoding] = ()) -> Tensor:
        """Add the target's own encoding."""
        if self.targets is not None:
            targets = _side_by_side([self.targets, *(each.targets for each in beside)])
            return target_CD + F.embedding(group_C, targets)
        for name in self.tables:
            table = self._table(name, beside)
            if self.form == "joint":
                target_CD = target_CD + F.embedding(group_C * self.rows[name], table)
            else:
                target_CD = target_CD + table[0]
        return target_CD

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
        """Add sum_k weight[c, k] * encoding[k] to each pooled vector.

        With `many` behaviors a candidate, or few marks, weights are summed by mark first, [C, marks], and
        multiplied with the whole table, in single precision as `weighted_bags` adds up.
        """
        for name, index in self._indices(marks, group_C):
            many_rows = many and self.form != "joint"
            pooled_CD = pooled_CD + self._summed(self._table(name, beside), index, weight_CK, many=many_rows)
        return pooled_CD

    def _summed(self, table: Tensor, index: Tensor, weight_CK: Tensor, *, many: bool) -> Tensor:
        """sum_k weight[c, k] * table[index[c, k]] -> [C, D]."""
        if many or (self.form != "joint" and table.shape[0] <= _FEW_MARKS):
            by_mark_CM = weight_CK.new_zeros(index.shape[0], table.shape[0]).scatter_add(1, index, weight_CK)
            with in_single_precision(table.device):
                return by_mark_CM @ table
        return weighted_bags(table, index, weight_CK)

    def behaviors(self, marks: Marks, group_C: Tensor) -> Tensor | float:
        """The encodings themselves: marks [C, K] -> [C, K, D]."""
        return sum(rows_at(self.tables[name], index) for name, index in self._indices(marks, group_C))

    def scores(self, query_CD: Tensor, marks: Marks, group_C: Tensor) -> Tensor:
        """<query, encoding> of every behavior, marks [C, K] -> [C, K], without a [C, K, D] intermediate."""
        score = torch.zeros(marks.position.shape, device=query_CD.device)
        for name in self.rows:
            table = self.tables[name]
            if self.form == "joint":
                rows_GR = table.view(self.groups, -1)
                table_CMD = F.embedding(group_C, rows_GR).unflatten(1, (self.rows[name], -1))
                score_CM = torch.einsum("cd,cmd->cm", query_CD, table_CMD)
            else:
                score_CM = query_CD @ table.T
            score = score + score_CM.gather(1, marks.index(name))
        return score

    def _table(self, name: str, beside: Sequence[TimeEncoding]) -> Tensor:
        return _side_by_side([self.tables[name], *(each.tables[name] for each in beside)])

    def _indices(self, marks: Marks, group_C: Tensor) -> Iterator[tuple[str, Tensor]]:
        """int64 rows of each table."""
        for name, count in self.rows.items():
            if self.form == "joint":
                yield name, group_rows(getattr(marks, name), group_C, count)
            else:
                yield name, marks.index(name)


def _side_by_side(tables: Sequence[Tensor | None]) -> Tensor:
    """[rows, D] of each -> [rows, sum of D]."""
    there = [table for table in tables if table is not None]
    return there[0] if len(there) == 1 else torch.cat(there, dim=1)
