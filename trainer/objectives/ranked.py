"""The ranking losses of tasks: whom they compare, and what they add to the loss of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from trainer.objectives.exchange import of_all_ranks, on_all_hosts
from trainer.objectives.given import Entry, Given, Term
from trainer.objectives.of_tasks import Trained
from trainer.objectives.ranking import Compared, HostCounts


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
    counts: dict[int, HostCounts] = {}
    if not _may_look(logits_CT.device):
        counts = _host_counts(tasks, wide if shared else {}, given)
    return {
        place: _compared(rows[place], own[place], *groups[task.task.settings.pairs], counts.get(place))
        for place, task in tasks.items()
    }


def _may_look(device: torch.device) -> bool:
    """Whether the host may ask how many positives there are, for which it need not wait."""
    return device.type == "cpu"


def _host_counts(
    tasks: Mapping[int, Trained], wide: Mapping[int, Trained], given: Given
) -> dict[int, HostCounts]:
    """Of each task by its place; collective where some of them are `wide`: compared with other ranks'."""
    sizes, found = given.step.batch.host_sizes, dict[int, HostCounts]()
    for place, task in tasks.items():
        positives, observed = sizes.positives[task.column], sizes.observed[task.column]
        pairs = sizes.pairs[task.column] if task.task.settings.pairs == "request" else None
        found[place] = HostCounts((0, positives, 0), (0, observed - positives, 0), pairs)
    if wide:
        mine = [count for place in wide for count in (found[place].positives[1], found[place].negatives[1])]
        every = on_all_hosts(mine if given.step.counted else [0] * len(mine), len(given.step.shares))
        if given.step.counted:
            for at, place in enumerate(wide):
                positives_R, negatives_R = ([counts[2 * at + side] for counts in every] for side in (0, 1))
                found[place] = HostCounts(_around(positives_R, given.rank), _around(negatives_R, given.rank))
    return found


def _around(counts: Sequence[int], rank: int) -> tuple[int, int, int]:
    """Of the ranks before one, of itself, and of those after it."""
    return sum(counts[:rank]), counts[rank], sum(counts[rank + 1 :])


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


def _compared(
    rows: Tensor, own: slice, group: Tensor | None, groups: int, counts: HostCounts | None
) -> Compared:
    logits, labels, weight, *base = rows.unbind(1)
    known = labels.detach(), weight.detach()
    return Compared(logits, base[0] if base else None, *known, group, groups, own, counts)
