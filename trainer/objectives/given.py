"""What the terms of a step's loss are computed from, and what each gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from trainer.data.reader import Step
from trainer.objectives.exchange import Sums
from trainer.objectives.losses import observed


@dataclass(frozen=True)
class Given:
    """One rank's part of a step.

    Attributes:
        step: as it was read; labels: [C, T], 0 where not observed.
        weight: [C, T] or [C, 1], 0 where not observed; observed: bool [C, T], None where all are.
        own, everyone: observed candidates of each task, on this rank (0 where its part does not count) and on
            all; domains: ids that a domain may have.
        rank: this one; sums: what is to be added up over ranks.
    """

    step: Step
    labels: Tensor
    weight: Tensor
    observed: Tensor | None
    own: Sequence[int]
    everyone: Sequence[int]
    domains: int
    rank: int
    sums: Sums

    @staticmethod
    def of(
        step: Step, counts: tuple[Sequence[int], Sequence[int]], domains: int, rank: int, sums: Sums
    ) -> Given:
        """`counts`: own and everyone's."""
        batch, known = step.batch, None
        labels, weight = batch.labels, batch.weight[:, None]
        if batch.task_weight is not None:
            weight = weight * batch.task_weight
        # The host knows of most batches that no label is missing; then the device need not look.
        if not batch.host_sizes.labelled:
            labels, weight, known = observed(labels, weight)
        return Given(step, labels, weight, known, *counts, domains, rank, sums)

    def observed_of(self, column: int) -> Tensor:
        """Bool [C], candidates that have a label of this task."""
        if self.observed is None:
            return self.labels[:, column].new_ones(()).bool().expand(self.labels.shape[0])
        return self.observed[:, column]

    def weight_of(self, column: int) -> Tensor:
        """[C], 0 where not observed."""
        return self.weight[:, column if self.weight.shape[1] > 1 else 0]


class Entry(NamedTuple):
    """What a term of a task adds to the report: sums, and what they are divided by; nothing has a gradient.

    Attributes:
        values: [1], or [domains]; counts: the same of this rank, or one number that the host knows.
    """

    values: Tensor
    counts: Tensor | int


class Term(NamedTuple):
    """A part of the loss of a step.

    Attributes:
        total: scalar: means of losses times the candidates of the step.
        entries: by task, its place among those that are trained.
    """

    total: Tensor
    entries: Mapping[int, Entry]
