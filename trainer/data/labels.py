"""From the labels of a log to those of a run's tasks: [candidates, T], NaN where a task was not observed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.config.tasks import Task, names_of, resolve_tasks
from trainer.data.row_group import Floats
from trainer.log.schema import LogManifest


@dataclass(frozen=True)
class TaskLabels:
    """Which labels of a log are read, and how they become those of T tasks.

    Attributes:
        tasks: in the order of the T columns.
        labels: those of the log that the tasks need, each once; what the log lacks is not among them.
        partial: those of them that may be null or NaN.
        weights: those of them with a sample weight of their own.
    """

    tasks: tuple[Task, ...]
    labels: tuple[str, ...]
    partial: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()

    @staticmethod
    def of(manifest: LogManifest, tasks: Sequence[Task] | None = None) -> TaskLabels:
        """Of a log. A task whose label, or a label of whose mask, the log lacks is never observed.

        Scoring needs no labels. Who trains resolves the tasks with the log's labels, which refuses it.

        Args:
            tasks: None means every label of the log.
        """
        chosen = tuple(resolve_tasks({}, manifest.tasks) if tasks is None else tasks)
        needed = {label for task in chosen for label in task.labels}
        own = {task.label for task in chosen}
        return TaskLabels(
            chosen,
            tuple(label for label in manifest.tasks if label in needed),
            tuple(label for label in manifest.partial if label in needed),
            tuple(label for label in manifest.label_weights if label in own),
        )

    @property
    def names(self) -> list[str]:
        """The tasks' names."""
        return names_of(self.tasks)

    @property
    def columns(self) -> list[str]:
        """The log's columns that are read."""
        return [f"label_{label}" for label in self.labels] + [f"weight_{label}" for label in self.weights]

    def of_tasks(self, found: Mapping[str, Floats], count: int) -> Floats:
        """The labels of the tasks, [count, T].

        Args:
            found: label of the log -> [count], NaN where it was not observed.
        """
        labels = np.full((count, len(self.tasks)), np.nan, dtype=np.float32)
        for column, task in zip(labels.T, self.tasks, strict=True):
            if task.label not in found:
                continue
            if task.mask is None:
                column[:] = found[task.label]
            else:
                np.copyto(column, found[task.label], where=task.mask.true(found))
        return labels

    def weights_of_tasks(self, found: Mapping[str, Floats], count: int) -> Floats | None:
        """The sample weights of the tasks, [count, T], 1 where a label has none; None where no label has any.

        Args:
            found: label of the log -> [count], its weights.
        """
        if not self.weights:
            return None
        weights = np.ones((count, len(self.tasks)), dtype=np.float32)
        for column, task in zip(weights.T, self.tasks, strict=True):
            if task.label in found:
                column[:] = found[task.label]
        return weights
