"""What a loss is that compares candidates, and how candidates of one group are added up.

A candidate of weight w stands for w candidates: weights multiply in the losses of positives and pairs, and in
the sums that a candidate is compared with. Groups without a positive or without a negative have nothing to
compare: they have no loss, and no part in the counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trainer.model.ops.bags import rows_at
from trainer.objectives.losses import by_group


@dataclass(frozen=True)
class HostCounts:
    """What the host knows of the candidates that are compared, and would wait for if it asked the device.

    Attributes:
        positives, negatives: on ranks before this one, on this one, and on those after it.
        pairs: of a positive and a negative of one group, where groups are this rank's requests; else None.
    """

    positives: tuple[int, int, int]
    negatives: tuple[int, int, int]
    pairs: int | None = None


@dataclass(frozen=True)
class Compared:
    """N candidates of one task, which are compared within groups.

    Attributes:
        logits: [N]; base: [N], the logit of the negative class, or None where the model has none.
        labels: [N], NaN where not observed; from 0.5 on a candidate is a positive.
        weight: [N].
        group: int64 [N], from 0 to groups - 1; None where all are of one group.
        own: the part of them that is this rank's. The others come from other ranks: without gradient.
        counts: None on a CPU, where the host may look at the labels.
    """

    logits: Tensor
    base: Tensor | None
    labels: Tensor
    weight: Tensor
    group: Tensor | None
    groups: int
    own: slice
    counts: HostCounts | None = None

    @cached_property
    def positive(self) -> Tensor:
        """Bool [N]."""
        return self.labels >= 0.5

    @cached_property
    def negative(self) -> Tensor:
        """Bool [N]."""
        return self.labels < 0.5

    @cached_property
    def mixed(self) -> Tensor:
        """Bool [N], observed candidates of groups with a positive and a negative."""
        both = (self.by_group(self.positive) > 0) & (self.by_group(self.negative) > 0)
        return self.of_group(both) & (self.positive | self.negative)

    def by_group(self, numbers: Tensor) -> Tensor:
        """[N] -> [groups], added up; bools are counted."""
        counted = numbers.to(torch.float64) if numbers.dtype == torch.bool else numbers
        return by_group(counted, self.group, self.groups)

    def of_group(self, numbers: Tensor) -> Tensor:
        """[groups] -> [N] or [1]: to each candidate what its group has."""
        # numbers[group] would have a gradient that several threads add up in no fixed order.
        return numbers if self.group is None else rows_at(numbers, self.group)

    def own_sums(self, numbers: Tensor) -> Tensor:
        """[N] -> [groups], of this rank's candidates only; the others give their gradient and no value."""
        first, end, count = self.own.start, self.own.stop, numbers.numel()
        if (first, end) != (0, count):
            before, own, after = numbers.split([first, end - first, count - end])
            numbers = torch.cat([before - before.detach(), own, after - after.detach()])
        return self.by_group(numbers)

    def logsumexp(self, logits: Tensor) -> Tensor:
        """log sum of weight x exp(logit) over the group of each candidate: [N] or [1].

        0 where a group has no observed candidate with a weight.
        """
        weight = torch.where(self.labels.isnan(), 0.0, self.weight)
        there = torch.where(weight > 0, logits.detach(), -torch.inf)
        if self.group is None:
            largest = there.amax(0, keepdim=True) if there.numel() else there.new_zeros(1)
        else:
            largest = there.new_full((self.groups,), -torch.inf).scatter_reduce(0, self.group, there, "amax")
        largest = torch.where(largest > -torch.inf, largest, 0.0)
        # Unobserved ones may have any logit; the exponent of none is above 0.
        exponent = torch.where(weight > 0, logits - self.of_group(largest), 0.0)
        total = self.by_group(weight * exponent.exp())
        return self.of_group(torch.where(total > 0, total, 1.0).log() + largest)


@dataclass(frozen=True)
class Ranking:
    """A loss that compares candidates.

    Attributes:
        values: candidates -> [groups], sums of losses times their weights.
        counts: candidates -> float64 [groups], how many losses these are, whatever their weights.
        two_logits: it trains the logits of both classes, `Compared.base`.

    Over all ranks, values and counts add up to those of all candidates, and gradients to the gradient.
    """

    values: Callable[[Compared], Tensor]
    counts: Callable[[Compared], Tensor]
    two_logits: bool = False
