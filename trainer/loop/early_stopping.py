"""When validation stops getting better: training ends, and the best checkpoint stays."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embeddings.errors import ConfigError, hint_of
from trainer.config.sections import EarlyStoppingConfig
from trainer.config.tasks import Task, names_of
from trainer.log.schema import LogManifest
from trainer.quality.metrics import Metrics

EVERY_TASK = "*"
LOWER_IS_BETTER = {"logloss"}


@dataclass
class Best:
    """The best validation so far; checkpoints keep it, so that a resumed run stops where it would have.

    Attributes:
        value: of the metric, None before the first; step: at which; fruitless: validations since then.
    """

    value: float | None = None
    step: int = -1
    fruitless: int = 0

    def update(self, config: EarlyStoppingConfig, metrics: Mapping[str, Metrics], step: int) -> bool:
        """Take a validation into account; -> whether it is the best. One without a value is never.

        Args:
            metrics: by task.
        """
        value = value_of(config, metrics)
        sign = -1 if config.metric in LOWER_IS_BETTER else 1
        better = math.isfinite(value)
        if better and self.value is not None:
            better = sign * (value - self.value) > config.min_delta
        if better:
            self.value, self.step, self.fruitless = value, step, 0
        else:
            self.fruitless += 1
        return better

    def over(self, config: EarlyStoppingConfig) -> bool:
        """Whether training has gone on for long enough without a better validation."""
        return config.on and self.fruitless >= config.patience


def watched(
    config: EarlyStoppingConfig, tasks: Collection[str], where: str = "train.early_stopping"
) -> tuple[str, ...]:
    """The tasks whose metric counts; `where`: the key of the config, for messages.

    Raises:
        ConfigError: there is no task of that name.
    """
    if config.task == EVERY_TASK:
        return tuple(tasks)
    if config.task and config.task not in tasks:
        hint = hint_of(config.task, tasks, f'it is one of {", ".join(tasks)}, or "*" for the mean over them')
        raise ConfigError(f"{where}.task = {config.task!r}: no such task; {hint}")
    return (config.task or next(iter(tasks)),)


def check_watched(
    config: EarlyStoppingConfig,
    tasks: Sequence[Task],
    manifest: LogManifest,
    where: str = "train.early_stopping",
) -> None:
    """Whether validation can tell when to stop; `where`: the key of the config, for messages.

    Raises:
        ConfigError: early stopping watches a task that is not there, or of which validation has no label.
    """
    names = watched(config, names_of(tasks), where)
    labels = [task.label for task in tasks if task.name in names]
    # Of logs that were made before labels could be missing, nothing is counted.
    counted = manifest.splits["validation"].labels if manifest.holds("validation") else {}
    if config.on and all(label in counted and not counted[label].observed for label in labels):
        raise ConfigError(
            f"{where} watches {names[0]}, and no candidate of the validation split has its label "
            f"{labels[0]}; name another task with {where}.task"
        )


def value_of(config: EarlyStoppingConfig, metrics: Mapping[str, Metrics]) -> float:
    """The metric of the watched task, or its mean over tasks; NaN if no watched task has it.

    A task lacks a metric by its labels alone, so that the same tasks are in every mean of one split.
    """
    values = [float(getattr(metrics[task], config.metric)) for task in watched(config, metrics)]
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def changed_watch(before: Mapping[str, Any], now: EarlyStoppingConfig, tasks: Collection[str]) -> str:
    """Why the best validation of an earlier start means nothing now; empty if it still does.

    Args:
        before: the whole config of that start, as a checkpoint keeps it.
    """
    if not now.on:
        return "train.early_stopping is off now"
    earlier = EarlyStoppingConfig(**before["train"].get("early_stopping", {}))
    if earlier.metric != now.metric:
        return f"train.early_stopping.metric was {earlier.metric}"
    first = watched(earlier, before.get("tasks") or tasks)
    return "" if first == watched(now, tasks) else f"train.early_stopping watched {' and '.join(first)}"
