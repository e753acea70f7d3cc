"""Which losses the tasks of a run have, by their names in the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from embeddings.errors import ConfigError
from trainer.config.tasks import Task
from trainer.objectives.losses import GAMMA, Objective
from trainer.objectives.ranking import Ranking
from trainer.objectives.table import objective_of, ranking_of


@dataclass(frozen=True)
class Trained:
    """A task with its losses.

    Attributes:
        column: its place among all tasks.
        name, objective: of its loss of single candidates; ranking: beside it, or None.
        gamma: see `trainer.objectives.losses.Objective`.
        by_domain: each domain has a mean of its own.
    """

    task: Task
    column: int
    name: str
    objective: Objective
    gamma: float
    ranking: Ranking | None
    by_domain: bool

    @property
    def share(self) -> float:
        """Of the loss of single candidates; the ranking loss has the rest."""
        return 1.0 if self.ranking is None else self.task.settings.bce_weight

    @property
    def ranked_by_domain(self) -> bool:
        """The same of the ranking loss, for which only pairs within a domain are of one domain."""
        return self.ranking is not None and self.by_domain and self.task.settings.pairs == "domain"


def trained_tasks(tasks: Sequence[Task], default: str, domains: int, mean: str = "step") -> list[Trained]:
    """The tasks that have a loss of their own, in their order.

    Args:
        default: `train.objective`; domains: ids that a domain may have, 0 where candidates have no domain.
        mean: `train.mean`.

    Raises:
        ConfigError: a task names a loss that there is not, or one that cannot be had.
    """
    objective_of(default)
    if not any(task.weight for task in tasks):
        raise ConfigError("tasks: all of them have weight = 0, so nothing is trained; give one a weight")
    trained = []
    for column, task in enumerate(tasks):
        settings, where = task.settings, f"tasks.{task.name}"
        name = settings.loss or default
        if settings.loss == "none":
            if problem := _untrained(task, tasks):
                raise ConfigError(f'{where}.loss = "none": {problem}')
            continue
        objective = objective_of(name, f"{where}.loss" if settings.loss else "train.objective")
        if settings.gamma is not None and not objective.gamma:
            raise ConfigError(f'{where}.gamma is for loss = "focal", and the loss is {name!r}; leave it out')
        ranking = None
        if settings.rank != "none":
            ranking = ranking_of(settings.rank, f"{where}.rank")
            if ranking.two_logits and settings.product:
                problem = "needs a logit for each class, which a product has not; name another"
                raise ConfigError(f"{where}.rank = {settings.rank!r} {problem}")
        by_domain = task.means_by_domain(mean)
        given = {f"{where}.mean" if settings.mean else "train.mean": by_domain}
        for key, asked in {**given, f"{where}.pairs": settings.pairs == "domain"}.items():
            if asked and not domains:
                problem = "candidates have no domain; name the feature that says it in data.domain"
                raise ConfigError(f'{key} = "domain": {problem}')
        gamma = GAMMA if settings.gamma is None else settings.gamma
        trained.append(Trained(task, column, name, objective, gamma, ranking, by_domain))
    return trained


def _untrained(task: Task, tasks: Sequence[Task]) -> str:
    """Why nothing trains a task without a loss of its own, and what to do; empty if a product does."""
    if task.settings.product:
        return "a product trains others by its own loss alone; leave loss out, or set weight = 0"
    products = [each for each in tasks if task.name in each.settings.product]
    if not products:
        return (
            "nothing trains the task; give it a loss, or name it in a product (weight = 0 only measures it)"
        )
    if not any(each.weight for each in products):
        silent = f"tasks.{products[0].name}.weight = 0"
        return f"only a product trains the task, and {silent}; give one of them a weight"
    return ""
