"""Steps of nothing but candidates, and losses of their tasks written as loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from embeddings.lookup.jagged import one_id_bags
from trainer.config.tasks import Task, TaskConfig, resolve_tasks
from trainer.data.batch import RequestBatch
from trainer.data.cursor import Cursor
from trainer.data.reader import Step
from trainer.model.frame import Prediction
from trainer.objectives.step_loss import Losses, StepLoss

DOMAINS = 3


@dataclass(frozen=True)
class Drawn:
    """C candidates of T tasks, in order of their requests.

    Attributes:
        logits, base, auxiliary, labels, task_weight: [C, T]; weight, request, domain: [C].
    """

    logits: Tensor
    base: Tensor
    auxiliary: Tensor
    labels: Tensor
    weight: Tensor
    task_weight: Tensor
    request: Tensor
    domain: Tensor
    experts: Tensor

    def part(self, rows: slice) -> Drawn:
        """Some of the candidates; the tensors that losses have gradients of are leaves of their own."""
        parts = {name: part[rows].detach().clone() for name, part in vars(self).items()}
        for name in ("logits", "base", "auxiliary", "experts"):
            parts[name].requires_grad_()
        return Drawn(**parts)

    def prediction(self) -> Prediction:
        return Prediction(self.logits, self.auxiliary, self.base, self.experts)

    def step(self, step_candidates: int = 0, counted: bool = True, shares: tuple[int, ...] = ()) -> Step:
        count = self.labels.shape[0]
        _, request = self.request.unique_consecutive(return_inverse=True)
        requests = int(request.max()) + 1 if count else 0
        each, none = torch.zeros(requests, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        batch = RequestBatch(
            one_id_bags(["item_id"], torch.zeros(1, count, dtype=torch.int64)),
            none,
            *[each] * 6,
            request,
            self.labels,
            self.weight,
            torch.zeros(count, 0),
            None,
            None,
            step_candidates or count,
            task_weight=self.task_weight,
            domain=self.domain,
        )
        return Step(batch, counted, Cursor(), shares=shares)

    def losses(self, of: StepLoss, step: Step | None = None) -> Losses:
        return of.of(step or self.step(), self.prediction(), 0.5)


def drawn(seed: int, count: int, tasks: int, missing: float = 0.2, positives: float = 0.4) -> Drawn:
    random = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random)

    labels = (uniform(count, tasks) < positives).float()
    labels[uniform(count, tasks) < missing] = torch.nan
    whole = Drawn(
        *(torch.randn(count, tasks, generator=random) * 2 for _ in range(3)),
        labels,
        (uniform(count) * 3).floor() / 2,
        uniform(count, tasks),
        (uniform(count) * 4).long().sort().values,
        (uniform(count) * DOMAINS).long(),
        torch.randn(count, 3, 4, generator=random),
    )
    return whole.part(slice(0, count))


def tasks_of(*settings: dict[str, Any]) -> tuple[Task, ...]:
    """Tasks a, b, ... whose labels are partial."""
    configs = {"abcdef"[place]: TaskConfig(**each) for place, each in enumerate(settings)}
    return resolve_tasks(configs, list(configs), list(configs))


def looped_loss(tasks: Sequence[Task], given: Drawn, objective: str = "bce") -> Tensor:
    """The mean loss of a step, candidate by candidate and pair by pair, in float64."""
    double = replace(
        given, **{name: getattr(given, name).double() for name in ("logits", "base", "auxiliary", "experts")}
    )
    total = torch.zeros((), dtype=torch.float64)
    for column, task in enumerate(tasks):
        settings = task.settings
        share = settings.bce_weight if settings.rank != "none" else 1.0
        kind = settings.loss or objective
        if kind == "none":
            continue
        for logits, factor in ((double.logits, share), (double.auxiliary, 0.5)):
            total = total + task.weight * factor * _looped_points(kind, settings, column, logits, double)
        if settings.rank != "none":
            total = total + task.weight * (1 - share) * _looped_ranks(settings, column, double)
    return total


def _groups(kind: str, rows: list[int], given: Drawn) -> list[list[int]]:
    of = {"step": [0] * given.labels.shape[0], "request": given.request.tolist()}
    of["domain"] = given.domain.tolist()
    return [[row for row in rows if of[kind][row] == group] for group in sorted({of[kind][r] for r in rows})]


def _looped_points(kind: str, settings: TaskConfig, column: int, logits: Tensor, given: Drawn) -> Tensor:
    labels, weights = given.labels[:, column].tolist(), _weights(given, column)
    observed = [row for row, label in enumerate(labels) if not math.isnan(label)]
    total = torch.zeros((), dtype=torch.float64)
    for rows in _groups("domain" if settings.mean == "domain" else "step", observed, given):
        z = logits[:, column]
        p, gamma = z.sigmoid(), settings.gamma or 2.0
        negatives = [row for row in rows if labels[row] == 0]
        shift = 1.0
        if kind == "focal" and sum(weights[row] for row in negatives) > 0:
            powers = sum(weights[row] * p[row] ** gamma for row in negatives)
            shift = 1 - powers / sum(weights[row] for row in negatives)
        for row in rows:
            factor: Any = 1.0
            if kind == "focal":
                factor = (1 - p[row]) ** gamma if labels[row] else p[row] ** gamma + shift
            loss = F.softplus(-z[row] if labels[row] else z[row])
            total = total + weights[row] * factor * loss / len(rows)
    return total


def _looped_ranks(settings: TaskConfig, column: int, given: Drawn) -> Tensor:
    labels, weights = given.labels[:, column].tolist(), _weights(given, column)
    observed = [row for row, label in enumerate(labels) if not math.isnan(label)]
    z1, z0 = given.logits[:, column], given.base[:, column]
    values: list[Tensor] = []
    means: list[Tensor] = []
    for rows in _groups(settings.pairs, observed, given):
        positives = [row for row in rows if labels[row]]
        negatives = [row for row in rows if not labels[row]]
        if not (positives and negatives):
            continue
        if settings.rank == "pair":
            for i in positives:
                values += [weights[i] * weights[j] * F.softplus(z1[j] - z1[i]) for j in negatives]
        elif settings.rank == "jrc":
            for i in rows:
                z = z1 + z0 if labels[i] else z0
                among = sum(weights[k] * z[k].exp() for k in rows)
                values.append(weights[i] * (among.log() - z[i]) if weights[i] else z[i] * 0)
        else:
            e = z1.sigmoid() if settings.rank == "listce" else z1.exp()
            for i in positives:
                among = sum(weights[k] * e[k] for k in rows)
                values.append(-weights[i] * (e[i] / among).log() if weights[i] else e[i] * 0)
        if settings.mean == settings.pairs == "domain":
            means.append(torch.stack(values).mean())
            values = []
    means += [torch.stack(values).mean()] if values else []
    return torch.stack(means).sum() if means else torch.zeros((), dtype=torch.float64)


def _weights(given: Drawn, column: int) -> list[float]:
    weights: list[float] = (given.weight * given.task_weight[:, column]).tolist()
    return weights
