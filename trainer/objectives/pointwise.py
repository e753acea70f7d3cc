"""The losses of single candidates, of tasks that have the same one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor

from trainer.objectives.given import Entry, Given, Term
from trainer.objectives.losses import Points, by_group
from trainer.objectives.of_tasks import Trained


def pointwise(
    tasks: Mapping[int, Trained], logits_CT: Tensor, given: Given, mixed: bool = True
) -> Callable[[], Term]:
    """Asks for what other ranks must add up, and -> what gives the losses once that is there.

    Args:
        tasks: by place; they have the same objective and kind of mean.
        logits_CT: of all tasks of the run.
        mixed: a ranking loss takes its share from them.
    """
    one = next(iter(tasks.values()))
    columns = [task.column for task in tasks.values()]
    points = Points(
        _take(logits_CT, columns), _take(given.labels, columns), _take(given.weight, columns), one.gamma
    )
    shares = [task.task.weight * (task.share if mixed else 1.0) for task in tasks.values()]
    domain = given.step.batch.domain if one.by_domain else None
    groups = given.domains if one.by_domain else 1
    asked = one.objective.sums
    with torch.no_grad():
        of_ranks = None if asked is None else given.sums.put(by_group(asked(points), domain, groups))
        observed = (
            torch.stack([given.observed_of(column) for column in columns], 1) if one.by_domain else None
        )
        counts_GT = None if observed is None else by_group(observed.double(), domain, groups)
        every_GT = None if counts_GT is None else given.sums.put(counts_GT)

    def term() -> Term:
        sums = None
        if of_ranks is not None:
            sums = of_ranks() if domain is None else of_ranks()[domain]
        losses_CT = one.objective.losses(
            Points(points.logits, points.labels, points.weight, points.gamma, sums)
        )
        if counts_GT is None or every_GT is None:
            candidates = given.step.batch.step_candidates
            factors = [
                share * (candidates / max(1, given.everyone[column]))
                for share, column in zip(shares, columns, strict=True)
            ]
            total, sums_T = _added(losses_CT, factors)
            counts: Sequence[Tensor | int] = [given.own[column] for column in columns]
            return Term(total, _entries(tasks, sums_T[None], counts))
        sums_GT = by_group(losses_CT, domain, groups)
        of_domains = given.step.batch.step_candidates / every_GT().clamp(min=1)
        parts = [
            share * (sums_GT[:, place] * of_domains[:, place].to(sums_GT.dtype)).sum()
            for place, share in enumerate(shares)
        ]
        own_GT = counts_GT if given.step.counted else torch.zeros_like(counts_GT)
        return Term(reduce(add, parts), _entries(tasks, sums_GT.detach(), own_GT.unbind(1)))

    return term


def _take(numbers_CT: Tensor, columns: Sequence[int]) -> Tensor:
    """Some columns; without a copy, and a tensor of indices on the way, where they are all of them."""
    if numbers_CT.shape[1] == 1 or columns == list(range(numbers_CT.shape[1])):
        return numbers_CT
    return torch.stack([numbers_CT[:, column] for column in columns], dim=1)


def _added(losses_CT: Tensor, factors: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Losses added up over candidates, and over tasks with their factors, and the sums of tasks [T]."""
    first = factors[0]
    if first and all(factor == first for factor in factors):
        # A division, which for T tasks of weight 1 / T is the mean over tasks to the bit.
        whole = losses_CT.sum()
        one = losses_CT.shape[1] == 1
        return whole / (1 / first), whole.detach()[None] if one else losses_CT.detach().sum(0)
    sums_T = losses_CT.sum(0)
    parts = [factor * each for factor, each in zip(factors, sums_T.unbind(), strict=True)]
    return reduce(add, parts), sums_T.detach()


def _entries(
    tasks: Mapping[int, Trained], values_GT: Tensor, counts: Sequence[Tensor | int]
) -> dict[int, Entry]:
    return {
        place: Entry(values, count)
        for place, values, count in zip(tasks, values_GT.unbind(1), counts, strict=True)
    }
