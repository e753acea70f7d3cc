"""The loss of a step: what every task and term adds to it, exact under any number of ranks.

Each term of a task is a mean over what it counts in the whole step (observed candidates, pairs, positives):
the sum over all ranks, by the count over all ranks or 1 where that is 0. So a candidate's loss does not
depend on the company it is in, except through those counts. Weights multiply; nothing divides by them.

Terms are kept as sums, times the candidates of the step by the term's own count. `rank_loss` makes means of
them, of all terms at once; where all candidates of all tasks are observed, no other factor is left.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.config.tasks import Task
from trainer.data.reader import Step
from trainer.model.frame import Prediction
from trainer.objectives.covariance import Covariance
from trainer.objectives.exchange import Sums, sum_on_hosts
from trainer.objectives.given import Entry, Given, Term
from trainer.objectives.of_tasks import Trained, trained_tasks
from trainer.objectives.pointwise import pointwise
from trainer.objectives.ranked import compared_of, ranked
from trainer.objectives.retrieval import RetrievalLoss


class Tally(NamedTuple):
    """What a step adds to the report, on this rank; `StepLoss.report` reads the sum over steps and ranks.

    Attributes:
        values: [P] on the device, complete once the backward pass is done; counts: float64 [P], on the host
            where it knows all. Both are 0 where the rank's part of the step does not count.
        total: scalar, the losses of all tasks without those of an auxiliary head, before `rank_loss`.
    """

    values: Tensor
    counts: Tensor
    total: Tensor


@dataclass(frozen=True)
class Losses:
    """The losses of one rank's part of a step.

    Attributes:
        parts: scalars to be added up, before `rank_loss`; tally: for the report.
        silent: tasks with a tower that no loss reaches in this step on any rank.
        by_task: task with a loss of its own -> what it adds, scalar, where that was asked for. Those without
            a weight, or without a label on any rank, are left out.
    """

    parts: Sequence[Tensor]
    tally: Tally
    silent: Collection[str]
    by_task: Mapping[str, Tensor] = field(default_factory=dict)

    def total(self) -> Tensor:
        """Scalar."""
        return self._sum

    @cached_property
    def _sum(self) -> Tensor:
        # Added up once, whoever asks.
        return reduce(add, self.parts)


class _Part(NamedTuple):
    """A stretch of the numbers of a tally.

    `task`: its place among the trained ones, -1: of none; `what`: loss, rank, gradient, covariance or
    retrieval.
    """

    task: int
    what: str
    size: int = 1


class StepLoss:
    """The loss of a step by the tasks of a run.

    Args:
        tasks: of the run; objective: `train.objective`; domains: ids that a domain may have, 0 without.
        covariance: of the model's experts, or None; retrieval: of its auxiliary head, or None.
        world_size, rank: of this process; mean: `train.mean`.

    Attributes:
        by_task: the loss of each task is wanted by itself.

    Raises:
        ConfigError: see `trained_tasks`.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        objective: str = "bce",
        domains: int = 0,
        covariance: Covariance | None = None,
        world_size: int = 1,
        rank: int = 0,
        mean: str = "step",
        retrieval: RetrievalLoss | None = None,
    ) -> None:
        self._all = tuple(tasks)
        self.tasks = dict(enumerate(trained_tasks(tasks, objective, domains, mean)))
        self._domains, self._covariance, self._retrieval = domains, covariance, retrieval
        self._world_size, self._rank = world_size, rank
        self.by_task = False
        self._ranked = {place: task for place, task in self.tasks.items() if task.ranking is not None}
        # Known to every rank without asking another.
        self._partial = any(task.partial for task in tasks)
        self._parts = list(self._tallied())

    @property
    def by_task(self) -> bool:
        return self._by_task

    @by_task.setter
    def by_task(self, wanted: bool) -> None:
        self._by_task = wanted
        # Tasks with the same loss are computed together, unless each is wanted by itself.
        families: dict[Any, dict[int, Trained]] = {}
        for place, task in self.tasks.items():
            alike = (task.name, task.gamma, task.by_domain, place if wanted else -1)
            families.setdefault(alike, {})[place] = task
        self._families = list(families.values())

    def _tallied(self) -> Iterator[_Part]:
        for place, task in self.tasks.items():
            yield _Part(place, "loss", self._domains if task.by_domain else 1)
            if task.ranking is not None:
                yield _Part(place, "rank", self._domains if task.ranked_by_domain else 1)
                yield _Part(place, "gradient")
        if self._covariance is not None:
            yield _Part(-1, "covariance")
        if self._retrieval is not None:
            yield _Part(-1, "retrieval")

    def of(self, step: Step, prediction: Prediction, auxiliary_weight: float = 0.0) -> Losses:
        """The losses of this rank's part of a step; collective where other ranks must be asked.

        An auxiliary prediction is trained by the losses of single candidates alone.
        """
        counts = self._counts(step)
        sums = Sums(self._world_size > 1, step.counted)
        given = Given.of(step, counts, self._domains, self._rank, sums)
        logits_CT = prediction.logits.float()
        # What all ranks add up is asked for first, in one exchange.
        main = [pointwise(family, logits_CT, given) for family in self._families]
        auxiliary = []
        if prediction.auxiliary is not None:
            logits = prediction.auxiliary.float()
            auxiliary = [pointwise(family, logits, given, mixed=False) for family in self._families]
        if self._ranked:
            base_CT = None if prediction.base is None else prediction.base.float()
            compared = compared_of(self._ranked, logits_CT, base_CT, given)
            ranks = [ranked(task, place, compared[place], given) for place, task in self._ranked.items()]
        else:
            ranks = []
        sums.exchange()
        terms, ranking = [compute() for compute in main], [compute() for compute in ranks]
        total = reduce(add, [term.total for term in (*terms, *ranking)])
        parts = [total]
        beside = [compute() for compute in auxiliary]
        if beside:
            parts.append(auxiliary_weight * reduce(add, [term.total for term in beside]))
        by_task = self._each((*terms, *ranking), beside, auxiliary_weight, counts[1]) if self._by_task else {}
        entries = {(place, "loss"): entry for term in terms for place, entry in term.entries.items()}
        entries |= {(place, "rank"): entry for term in ranking for place, entry in term.entries.items()}
        if self._covariance is not None:
            value, count = self._covariance_of(step, prediction)
            parts.append(self._covariance.factor * step.batch.step_candidates * value)
            entries[-1, "covariance"] = Entry(value.detach()[None], count)
        if self._retrieval is not None:
            if prediction.retrieved is None:
                raise ValueError("the model retrieves nothing, and the loss is to have its part")
            part, entries[-1, "retrieval"] = self._retrieval.of(prediction.retrieved, given)
            parts.append(auxiliary_weight * part)
            if (name := self._retrieval.task.name) in by_task:
                by_task[name] = by_task[name] + parts[-1]
        for place, task in self._ranked.items():
            negative = given.observed_of(task.column) & (given.labels[:, task.column] < 0.5)
            negatives = negative.sum()[None].double() * step.counted
            entries[place, "gradient"] = Entry(logits_CT.new_zeros(1), negatives)
        tally = self._tally(step, entries, total)
        if self._ranked and logits_CT.requires_grad:
            self._watch(logits_CT, given, tally.values)
        return Losses(parts, tally, self._silent(counts[1]), by_task)

    def _each(
        self, terms: Sequence[Term], beside: Sequence[Term], factor: float, counts: Sequence[int]
    ) -> dict[str, Tensor]:
        """The loss of each task, whose terms are of no other task.

        Args:
            beside: terms of the auxiliary prediction; factor: their weight.
            counts: of all tasks on all ranks.
        """
        found = dict[str, Tensor]()
        totals = [(term, term.total) for term in terms] + [(term, factor * term.total) for term in beside]
        for term, total in totals:
            (place,) = term.entries
            task = self.tasks[place]
            name = task.task.name
            if task.task.weight and counts[task.column]:
                found[name] = found[name] + total if name in found else total
        return found

    def _covariance_of(self, step: Step, prediction: Prediction) -> tuple[Tensor, int]:
        """This rank's part of the covariance, and of the step's one count."""
        if prediction.experts is None:
            raise ValueError("the head gives no experts, and the loss is to have their covariance")
        assert self._covariance is not None
        value = self._covariance.value(prediction.experts.float(), step.shares, self._rank)
        return value, int(step.counted and self._rank == next(self._counted_ranks(step)))

    def _counted_ranks(self, step: Step) -> Iterator[int]:
        return (rank for rank, share in enumerate(step.shares or (1,)) if share)

    def _tally(self, step: Step, entries: dict[tuple[int, str], Entry], total: Tensor) -> Tally:
        ordered = [entries[part.task, part.what] for part in self._parts]
        values = ordered[0].values if len(ordered) == 1 else torch.cat([entry.values for entry in ordered])
        known = [entry.counts for entry in ordered if isinstance(entry.counts, int)]
        if len(known) == len(ordered):
            counts = torch.tensor(known, dtype=torch.float64)
        else:
            counts = torch.cat(
                [
                    # A fill, since a copy from the host would have it wait for the device.
                    torch.full((1,), entry.counts, dtype=torch.float64, device=values.device)
                    if isinstance(entry.counts, int)
                    else entry.counts
                    for entry in ordered
                ]
            )
        total = total.detach()
        if not step.counted:
            values, total = torch.zeros_like(values), torch.zeros_like(total)
        return Tally(values, counts, total)

    def _watch(self, logits_CT: Tensor, given: Given, values: Tensor) -> None:
        """Have the backward pass note |gradient| of the logits of negatives, of tasks with a ranking loss.

        Of the whole loss of the step, as a mean over its candidates: what `rank_loss` adds for the average
        over ranks is taken out again.
        """
        at = 0
        places = dict[int, int]()
        for part in self._parts:
            if part.what == "gradient":
                places[part.task] = at
            at += part.size

        def note(gradient_CT: Tensor) -> None:
            for place, slot in places.items():
                column = self.tasks[place].column
                negative = given.observed_of(column) & (given.labels[:, column] < 0.5)
                sizes = gradient_CT[:, column].abs() * negative
                # Once for each backward pass through the logits.
                values[slot] += sizes.sum() / self._world_size

        logits_CT.register_hook(note)

    def _counts(self, step: Step) -> tuple[list[int], list[int]]:
        """Observed candidates of each task: on this rank, where its part counts, and on all."""
        sizes, tasks = step.batch.host_sizes, len(self._all)
        own = [step.batch.candidates] * tasks if sizes.labelled else list(sizes.observed)
        own = own if step.counted else [0] * tasks
        if self._world_size == 1:
            return own, own
        if not self._partial:
            return own, [step.batch.step_candidates] * tasks
        return own, sum_on_hosts(own)

    def _silent(self, counts: Sequence[int]) -> list[str]:
        """Given the counts of all tasks on all ranks."""
        if all(counts) and all(task.task.weight for task in self.tasks.values()):
            return []
        heard = [task.task for task in self.tasks.values() if counts[task.column] and task.task.weight]
        reached = {name for task in heard for name in (task.name, *task.settings.product)}
        return [task.name for task in self._all if task.has_tower and task.name not in reached]

    def report(
        self, values: Tensor, counts: Tensor, total: Tensor | None = None, candidates: int = 0
    ) -> dict[str, Any]:
        """What was trained in many steps, of the tallies of all ranks added up.

        `loss` adds up the losses of all tasks with their weights. What nobody observed is NaN, and no part
        of it.

        Args:
            total: of the tallies, too, with the candidates of these steps. It is rounded as it always was,
                and taken for `loss` where every candidate counts for every task.
        """
        sizes = [part.size for part in self._parts]
        stretches = zip(values.double().cpu().split(sizes), counts.cpu().split(sizes), strict=True)
        means = {}
        for part, (value, count) in zip(self._parts, stretches, strict=True):
            mean = float((value / count.clamp(min=1)).sum())
            means[part.task, part.what] = mean if bool((count > 0).any()) else math.nan
        tasks = {}
        for place, task in self.tasks.items():
            own = {"loss": means[place, "loss"]}
            if task.ranking is not None:
                terms = {task.name: own["loss"], task.task.settings.rank: means[place, "rank"]}
                shares = zip((task.share, 1 - task.share), terms.values(), strict=True)
                mixed = sum(share * _or_zero(mean) for share, mean in shares)
                own = {"loss": mixed, **terms, "negative_gradient": means[place, "gradient"]}
            tasks[task.task.name] = own
        loss = sum(task.task.weight * _or_zero(tasks[task.task.name]["loss"]) for task in self.tasks.values())
        by_domain = any(task.by_domain for task in self.tasks.values())
        if total is not None and not (self._partial or self._ranked or by_domain):
            loss = float(total) / candidates
        report: dict[str, Any] = {**next(iter(tasks.values())), "loss": loss}
        if len(tasks) > 1:
            report = {"loss": loss, "tasks": tasks}
        if self._covariance is not None:
            report["covariance"] = means[-1, "covariance"]
        if self._retrieval is not None:
            report["retrieval"] = means[-1, "retrieval"]
        return report


def _or_zero(mean: float) -> float:
    """`mean`, NaN where nothing was counted."""
    return 0.0 if math.isnan(mean) else mean
