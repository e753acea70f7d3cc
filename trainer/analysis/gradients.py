"""What each task, domain and role asks of the rows of tables, at a checkpoint.

For some steps of data, the loss of each task (and of the candidates of each domain) goes backward by itself,
down to the looked-up vectors, and each role's part of it is taken down (`trainer.update.role_gradients`). The
norms and cosines are means over steps, as those that are watched in training
(`trainer.update.gradient_watch`). Nothing is updated.

The model is in eval mode, so that an auxiliary head has no part in it, nor a covariance of experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from embeddings.groups import TableName
from trainer.data.batch import RequestBatch
from trainer.data.cursor import Cursor
from trainer.data.reader import Step
from trainer.model.frame import Prediction, TwoStageModel
from trainer.objectives.losses import rank_loss
from trainer.objectives.step_loss import StepLoss
from trainer.update.gradient_watch import row_cosines
from trainer.update.role_gradients import RoleGradients, of_tables

# Domains that are told apart, those with the most candidates.
_MOST_DOMAINS = 8


class Puller(NamedTuple):
    """Who asks something of a row: `source` is a task, or `domain ID`; `role` of the vectors."""

    source: str
    role: str


@dataclass(frozen=True)
class Pair:
    """What two of them ask of the rows that both of them reach; means over steps.

    Attributes:
        cosine: mean over rows; conflict: the share of rows where it is negative; whole: the cosine of the
            gradients of all rows together.
    """

    cosine: float
    conflict: float
    whole: float


@dataclass(frozen=True)
class Pulls:
    """What is asked of the tables of one group.

    Attributes:
        norms: puller -> mean over rows of the norm of a row's gradient; pairs: of two pullers.
    """

    norms: dict[Puller, float]
    pairs: dict[tuple[Puller, Puller], Pair]


def probe(
    model: TwoStageModel, batches: Iterable[RequestBatch], objective: str, mean: str
) -> dict[str, Pulls]:
    """Group -> what is asked of its tables, over some batches.

    Args:
        model: over tables of whatever kind; batches: with the ids that it knows, on its device.
        objective, mean: `train.objective` and `train.mean` of the run.
    """
    batches = list(batches)
    losses = StepLoss(model.tasks, objective, model.domains, mean=mean)
    losses.by_task = True
    domains = _domains(batches)
    gradients = RoleGradients(model)
    norms: dict[str, dict[Puller, list[float]]] = defaultdict(lambda: defaultdict(list))
    pairs: dict[str, dict[tuple[Puller, Puller], list[Pair]]] = defaultdict(lambda: defaultdict(list))
    model.eval()
    for batch in batches:
        pulled = _of_batch(model, gradients, losses, batch, domains)
        for group, rows in _by_group(pulled).items():
            for puller, parts in rows.items():
                norms[group][puller].append(_mean([each.norm(dim=1) for each in parts.values()]))
            for one, other in combinations(sorted(rows), 2):
                if (pair := _pair(rows[one], rows[other])) is not None:
                    pairs[group][one, other].append(pair)
    return {
        group: Pulls(
            {puller: float(np.mean(found)) for puller, found in of_pullers.items()},
            {both: _mean_pair(found) for both, found in pairs[group].items()},
        )
        for group, of_pullers in norms.items()
    }


def _domains(batches: Sequence[RequestBatch]) -> list[int]:
    """The domains with the most candidates, if there are several."""
    found = [batch.domain.cpu().numpy() for batch in batches if batch.domain is not None]
    ids, counts = np.unique(np.concatenate(found) if found else np.zeros(0), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_MOST_DOMAINS]
    return sorted(int(ids[place]) for place in order) if len(ids) > 1 else []


def _of_batch(
    model: TwoStageModel,
    gradients: RoleGradients,
    losses: StepLoss,
    batch: RequestBatch,
    domains: Sequence[int],
) -> dict[Puller, dict[str, Tensor]]:
    """Puller -> table -> gradients of the rows that the batch looks up, float64 [R, dim]."""
    groups = model.lookups.groups
    with torch.enable_grad(), model.lookups.cut() as cuts, gradients.taking() as taken:
        prediction = model(batch)
    leaves = [cut.outside for cut in cuts]
    sources = [each for each in (batch.features, batch.context) if each is not None]
    rows = {key: source[key].values().long().unique() for source in sources for key in source.keys()}  # noqa: SIM118
    found: dict[Puller, dict[str, Tensor]] = defaultdict(dict)
    for source, loss in _losses(losses, batch, prediction, domains):
        for each in taken:
            each.gradient = None
        torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        for table, of_roles in of_tables(taken, groups, rows).items():
            for role, part in of_roles.items():
                found[Puller(source, role)][table] = part
    return found


def _losses(
    losses: StepLoss, batch: RequestBatch, prediction: Prediction, domains: Sequence[int]
) -> Iterator[tuple[str, Tensor]]:
    """The loss of each task, then of all tasks by the candidates of each domain; those without any are left
    out."""
    of_tasks = losses.of(Step(batch, True, Cursor()), prediction).by_task
    for task, loss in of_tasks.items():
        if loss.requires_grad:
            yield task, rank_loss(loss, batch.step_candidates, 1, True)
    for domain in domains:
        assert batch.domain is not None
        labels = torch.where((batch.domain == domain)[:, None], batch.labels, torch.nan)
        part = replace(batch, labels=labels, sizes=None)
        own = losses.of(Step(part, True, Cursor()), prediction).by_task
        if own and not labels.isnan().all():
            total = torch.stack(list(own.values())).sum()
            yield f"domain {domain}", rank_loss(total, batch.step_candidates, 1, True)


def _by_group(
    pulled: Mapping[Puller, Mapping[str, Tensor]],
) -> dict[str, dict[Puller, dict[str, Tensor]]]:
    """Group -> puller -> table -> gradients; of those that ask anything of the group at all."""
    found: dict[str, dict[Puller, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for puller, tables in pulled.items():
        for table, rows in tables.items():
            name = TableName.of(table)
            assert name is not None
            found[name.group][puller][table] = rows
    return found


def _pair(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Pair | None:
    """None where no row is reached by both."""
    tables = [table for table in one if table in other]
    cosines = torch.cat([row_cosines(one[table], other[table]) for table in tables] or [torch.zeros(0)])
    if not cosines.numel():
        return None
    a, b = (torch.cat([part[table].flatten() for table in tables]) for part in (one, other))
    whole = float(a @ b / a.norm() / b.norm())
    return Pair(float(cosines.mean()), float((cosines < 0).double().mean()), whole)


def _mean_pair(found: Sequence[Pair]) -> Pair:
    cosine, conflict, whole = np.mean([[each.cosine, each.conflict, each.whole] for each in found], axis=0)
    return Pair(float(cosine), float(conflict), float(whole))


def _mean(parts: Sequence[Tensor]) -> float:
    """NaN where there are none."""
    whole = torch.cat(list(parts))
    return float(whole.mean()) if whole.numel() else float("nan")
