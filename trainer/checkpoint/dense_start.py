"""The dense weights of a run that starts from another one's, whose tasks may be others.

A task is known by its name: what belongs to it is taken over where the other run has a task of that name, and
keeps its first weights where not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

from embeddings.errors import CheckpointError
from trainer.checkpoint.unsharded import PlainTables
from trainer.config.tasks import Task, names_of
from trainer.model.heads.head import TaskWeights
from trainer.model.settings import ModelConfig

_HEAD = "head."
# How modules of a task, or of a set with its name, are called before its name.
_MODULES = ("task_", "set_")


@dataclass(frozen=True)
class TaskHeads:
    """Which weights of a head are whose.

    Attributes:
        names: tasks with towers, in the order of the head's rows; weights: see there.
    """

    names: tuple[str, ...]
    weights: TaskWeights = field(default_factory=TaskWeights)

    @staticmethod
    def of(model: ModelConfig, tasks: Iterable[Task]) -> TaskHeads:
        return TaskHeads(tower_names(tasks), model.head_kind.weights_of_tasks(model))


def tower_names(tasks: Iterable[Task]) -> tuple[str, ...]:
    """The tasks that a head gives logits of, in the order of its rows."""
    return tuple(names_of(task for task in tasks if task.has_tower))


def sets_of_new_tasks(tables: Iterable[str], source: PlainTables, heads: TaskHeads) -> set[str]:
    """Those of the tables that lie in a set called as a task that the source does not have, so nor they.

    They keep their first weights, as the task's tower does. A table is named `group/set/feature`.
    """
    before = source.manifest.tasks
    new = set() if before is None else set(heads.names).difference(before)
    parts = {table: table.split("/") for table in tables if table not in source.manifest.tables}
    return {table for table, names in parts.items() if len(names) == 3 and names[1] in new}


def fill_dense(weights: Mapping[str, Tensor], source: PlainTables, heads: TaskHeads) -> list[str]:
    """Copy the source's dense weights into a model's.

    Args:
        weights: all of the model that no table has, filled in place; heads: of the model.

    Returns:
        Lines that say which tasks were not there, and what was left aside.

    Raises:
        CheckpointError: a weight that no task accounts for is missing, or has another shape.
    """
    dense, now = source.dense(), heads.names
    # Folders of earlier versions do not say which tasks they have: then these are taken to be the same.
    before = None if source.manifest.tasks == now else source.manifest.tasks
    new = [] if before is None else [task for task in now if task not in before]
    kept: list[str] = []
    for name, weight in weights.items():
        old = dense.get(name)
        if before is not None and old is not None and _is_row_wise(name, heads):
            if _fill_rows_of_tasks(weight, old, now, before):
                continue
        elif before is not None and (_mixes(name, heads) or (old is None and _is_new(name, new))):
            kept.append(name)
            continue
        elif old is not None and old.shape == weight.shape:
            weight.copy_(old)
            continue
        found = f"is {tuple(old.shape)}" if old is not None else "is not there"
        raise CheckpointError(
            source.path,
            f"dense weight {name} {found}, this model's is {tuple(weight.shape)}: the [model] section, the "
            "groups' widths and the log's features must be those it was trained with",
        )
    if before is None:
        return []
    mixing = {_module_of(name, part): None for part in heads.weights.mixing for name in kept if part in name}
    return _lines(now, before, list(mixing))


def _is_row_wise(name: str, heads: TaskHeads) -> bool:
    return name.removeprefix(_HEAD) in heads.weights.rows and name.startswith(_HEAD)


def _mixes(name: str, heads: TaskHeads) -> bool:
    return name.startswith(_HEAD) and any(part in name for part in heads.weights.mixing)


def _module_of(name: str, part: str) -> str:
    """The name of a weight up to the module that follows `part` of it."""
    before, _, after = name.partition(part)
    return f"{before}{part}{after.split('.')[0]}"


def _is_new(name: str, new: Collection[str]) -> bool:
    """Whether a weight is in a module of one of these tasks, or of a set with its name."""
    parts = name.split(".")
    modules = {f"{kind}{task}" for kind in _MODULES for task in new}
    # A branch has its sequence models by set.
    after = {part for before, part in pairwise(parts) if before == "sequences"}
    return not modules.isdisjoint(parts) or not after.isdisjoint(new)


def _fill_rows_of_tasks(weight: Tensor, old: Tensor, now: Sequence[str], before: Sequence[str]) -> bool:
    """Copy the rows of the tasks that both have; False where the two differ in more than their tasks."""
    # One logit of each task, or two.
    halves = weight.shape[0] // len(now), old.shape[0] // len(before)
    if old.shape[1:] != weight.shape[1:] or old.shape[0] not in (len(before), 2 * len(before)):
        return False
    for half in range(min(halves)):
        for place, task in enumerate(now):
            if task in before:
                weight[half * len(now) + place].copy_(old[half * len(before) + before.index(task)])
    return True


def _lines(now: Sequence[str], before: Sequence[str], mixing: Sequence[str]) -> list[str]:
    lines = []
    if new := [task for task in now if task not in before]:
        lines.append(f"tasks: {', '.join(new)} not there before, with first weights of their own")
    if gone := [task for task in before if task not in now]:
        lines.append(f"tasks: {', '.join(gone)} left out")
    if mixing:
        lines.append(f"first weights, since they weigh what other tasks have: {', '.join(mixing)}")
    return lines
