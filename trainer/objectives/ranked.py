"""The ranking losses of tasks: whom they compare, and what they add to the loss of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trainer.objectives.exchange import of_all_ranks
from trainer.objectives.given import Entry, Given, Term
from trainer.objectives.of_tasks import Trained
from trainer.objectives.ranking import Compared


def ranked(task: Trained, place: int, compared: Compared, given: Given) -> Callable[[], Term]:
    """Asks for the counts of all ranks, and -> what gives the loss once they are there.

    `place`: of the task among those that are trained.
    """
    ranking, by_domain = task.ranking, task.ranked_by_domain
    assert ranking is not None
    with torch.no_grad():
        of_groups = ranking.counts(compared)
        counts = of_groups if by_domain else of_groups.sum()[None]
    everyone = given.sums.put(counts)

    def term() -> Term:
        of_groups = ranking.values(compared)
        values = of_groups if by_domain else of_groups.sum()[None]
        factors = given.step.batch.step_candidates / everyone().clamp(min=1)
        share = task.task.weight * (1 - task.share)
        total = share * (values * factors.to(values.dtype)).sum()
        own = counts if given.step.counted else torch.zeros_like(counts)
        return Term(total, {place: Entry(values.detach(), own)})

    return term


def compared_of(
    tasks: Mapping[int, Trained], logits_CT: Tensor, base_CT: Tensor | None, given: Given
) -> dict[int, Compared]:
    """Whom the ranking loss of each task compares; collective where these are on several ranks."""
    batch, shares = given.step.batch, given.step.shares
    # A rank whose part does not count compares its own candidates: that changes nothing, and all weights that
    # others have a gradient of have one here, too.
    shared = len(shares) > 1
    wide = {place: task for place, task in tasks.items() if task.task.settings.pairs != "request"}
    rows, own = dict[int, Tensor](), dict[int, slice]()
    domain = batch.domain
    for place, task in tasks.items():
        rows[place] = _columns(task, logits_CT, base_CT, given)
        own[place] = slice(0, batch.candidates)
    if shared and wide:
        widths = [rows[place].shape[1] for place in wide]
        every, mine = of_all_ranks(torch.cat([rows[place] for place in wide], dim=1), shares, given.rank)
        every_domain = None
        if domain is not None and any(task.task.settings.pairs == "domain" for task in wide.values()):
            every_domain, _ = of_all_ranks(domain, shares, given.rank)
        if given.step.counted:
            rows |= dict(zip(wide, every.split(widths, dim=1), strict=True))
            own |= dict.fromkeys(wide, mine)
            domain = every_domain
    groups = {"step": (None, 1), "request": (batch.candidate_request, batch.requests)}
    groups["domain"] = domain, given.domains
    return {
        place: _compared(rows[place], own[place], *groups[task.task.settings.pairs])
        for place, task in tasks.items()
    }


def _columns(task: Trained, logits_CT: Tensor, base_CT: Tensor | None, given: Given) -> Tensor:
    """Logit, label (NaN where not observed), weight and, where the loss needs it, the other logit: [C, *]."""
    column = task.column
    label = torch.where(given.observed_of(column), given.labels[:, column], torch.nan)
    columns = [logits_CT[:, column], label, given.weight_of(column)]
    if task.ranking is not None and task.ranking.two_logits:
        if base_CT is None:
            raise ValueError(
                f"task {task.task.name}: the head gives one logit, and its ranking loss needs two"
            )
        columns.append(base_CT[:, column])
    return torch.stack(columns, dim=1)


def _compared(rows: Tensor, own: slice, group: Tensor | None, groups: int) -> Compared:
    logits, labels, weight, *base = rows.unbind(1)
    return Compared(logits, base[0] if base else None, labels.detach(), weight.detach(), group, groups, own)
