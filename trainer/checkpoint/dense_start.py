"""The dense weights of a run that starts from another one's, whose tasks may be others.

A task is known by its name: what belongs to it is taken over where the other run has a task of that name, and
keeps its first weights where not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from embeddings.errors import CheckpointError
from embeddings.groups import TableGroup
from trainer.checkpoint.unsharded import PlainTables
from trainer.config.tasks import Task, names_of
from trainer.model.heads.head import TaskWeights
from trainer.model.settings import ModelConfig

_HEAD = "head."
# How modules of a task are called.
_MODULE = "task_"
# What is before the name of a set in the names of its modules, and before that of a task in an owner's.
_SETS, _OWNER = "sequences", "task:"


@dataclass(frozen=True)
class TaskHeads:
    """Which weights of a head are whose.

    Attributes:
        names: tasks with towers, in the order of the head's rows; None: those of the source, whatever it has.
        weights: see there; sets: a task's own set of the representation -> the task.
    """

    names: tuple[str, ...] | None = None
    weights: TaskWeights = field(default_factory=TaskWeights)
    sets: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(
        model: ModelConfig, tasks: Iterable[Task], groups: Mapping[str, TableGroup] = MappingProxyType({})
    ) -> TaskHeads:
        owned = {
            each.name: each.owner.removeprefix(_OWNER)
            for group in groups.values()
            for each in group.sets
            if each.owner.startswith(_OWNER)
        }
        return TaskHeads(tower_names(tasks), model.head_kind.weights_of_tasks(model), owned)

    def new_sets(self, source: PlainTables) -> set[str]:
        """The sets of tasks that the source did not have; none where it does not say which it had."""
        before = source.manifest.tasks
        return set() if before is None else {name for name, task in self.sets.items() if task not in before}


def tower_names(tasks: Iterable[Task]) -> tuple[str, ...]:
    """The tasks that a head gives logits of, in the order of its rows."""
    return tuple(names_of(task for task in tasks if task.has_tower))


def fill_dense(weights: Mapping[str, Tensor], source: PlainTables, heads: TaskHeads) -> list[str]:
    """Copy the source's dense weights into a model's.

    Args:
        weights: all of the model that no table has, filled in place; heads: of the model.

    Returns:
        Lines that say which tasks were not there, and what was left aside.

    Raises:
        CheckpointError: a weight that no task accounts for is missing, or has another shape.
    """
    dense, before, now = source.dense(), source.manifest.tasks, heads.names
    # Folders of earlier versions do not say which tasks they have: then these are taken to be the same.
    if before is None or now is None or before == now:
        before = now = None
    kept: list[str] = []
    new_sets = heads.new_sets(source)
    for name, weight in weights.items():
        old = dense.get(name)
        if before is not None and now is not None and old is not None and _is_row_wise(name, heads):
            if _fill_rows_of_tasks(weight, old, now, before):
                continue
        elif before is not None and (
            _mixes(name, heads) or (old is None and _is_new(name, before, new_sets))
        ):
            kept.append(name)
            continue
        elif old is not None and old.shape == weight.shape:
            weight.copy_(old)
            continue
        found = f"is {tuple(old.shape)}" if old is not None else "is not there"
        raise CheckpointError(
            source.name,
            f"dense weight {name} {found}, this model's is {tuple(weight.shape)}: the [model] section, the "
            "groups' widths and the log's features must be those it was trained with",
        )
    if before is None or now is None:
        return []
    # A gate has many weights, so that the modules are named which hold them.
    mixing = dict.fromkeys(_before(name, heads) for name in kept if _mixes(name, heads))
    return _lines(now, before, list(mixing))


def _is_row_wise(name: str, heads: TaskHeads) -> bool:
    return name.removeprefix(_HEAD) in heads.weights.rows and name.startswith(_HEAD)


def _mixes(name: str, heads: TaskHeads) -> bool:
    return name.startswith(_HEAD) and any(part in name for part in heads.weights.mixing)


def _before(name: str, heads: TaskHeads) -> str:
    """The module that holds all weights of that kind."""
    part = next(part for part in heads.weights.mixing if part in name)
    return name[: name.index(part) + len(part)].rstrip(".")


def _is_new(name: str, before: Sequence[str], new_sets: Collection[str]) -> bool:
    """Whether a weight is in a module of a task that the source did not have, or of such a task's set."""
    parts = name.split(".")
    modules = [part for part in parts if part.startswith(_MODULE)]
    of_set = _SETS in parts and parts[parts.index(_SETS) + 1] in new_sets
    return of_set or any(part.removeprefix(_MODULE) not in before for part in modules)


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
