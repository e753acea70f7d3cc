"""What each task of a run learns, and from how many candidates, as a table at the start."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.console import table_lines
from trainer.config.tasks import Task
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import LogManifest
from trainer.run_config import Config


def task_lines(config: Config, manifest: LogManifest, train: SequenceLogReader) -> Iterator[str]:
    """The table, for runs with several tasks, and what means by domain make of a loss."""
    tasks = train.columns.labels.tasks
    if len(tasks) > 1:
        rows = [
            [
                task.name,
                _learned(task),
                _loss(task, config.train.objective),
                "-" if task.settings.loss == "none" else f"{task.weight:g}",
                _observed(task, manifest, train),
            ]
            for task in tasks
        ]
        yield from table_lines(
            ["task", "label", "loss", "weight", f"of {train.candidates:,} candidates"], rows
        )
    by_domain = [task.name for task in tasks if task.means_by_domain(config.train.mean)]
    if by_domain:
        who = "the loss" if len(by_domain) == len(tasks) else f"the loss of {', '.join(by_domain)}"
        yield (
            f'mean = "domain": {who} is the sum of the means of the domains in a step, each alike; '
            f"candidates without {config.data.domain} are a domain, too"
        )


def _learned(task: Task) -> str:
    """The label of a task, with its mask or its factors."""
    if task.settings.product:
        return f"{task.label} = {' x '.join(task.settings.product)}"
    return f"{task.label} where {task.settings.mask}" if task.settings.mask else task.label


def _loss(task: Task, default: str) -> str:
    settings = task.settings
    name = settings.loss or default
    if name == "none":
        return "that of products"
    if settings.rank == "none":
        return name
    share = settings.bce_weight
    return f"{share:g} {name} + {1 - share:g} {settings.rank} by {settings.pairs}"


def _observed(task: Task, manifest: LogManifest, train: SequenceLogReader) -> str:
    """The candidates that a task learns from; a log that was made before labels could be missing has all."""
    counted = manifest.splits[train.split].labels.get(task.label)
    count = counted.observed if counted is not None else train.candidates
    return f"{'at most ' if task.mask else ''}{count:,}"
