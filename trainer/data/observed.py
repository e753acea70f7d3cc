"""Which tasks the first candidates of a split train, before a step is taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from embeddings.errors import ConfigError, DataError
from trainer.config.tasks import Task
from trainer.data.reader import SequenceLogReader
from trainer.data.rows import Columns, read_rows
from trainer.log.schema import LogManifest

# A task that has no candidate in so many row groups is told of; looking further would take time.
MOST_ROW_GROUPS = 32


class Unobserved(NamedTuple):
    """Tasks of which no candidate counts; `candidates`: looked at; `whole`: these are all of the split."""

    tasks: list[Task]
    candidates: int
    whole: bool


def unobserved(reader: SequenceLogReader, most: int = MOST_ROW_GROUPS) -> Unobserved:
    """Look at row groups in stored order, until every task has a candidate that it observes and that weighs.

    Reads labels, weights and lengths alone, and nothing where all candidates of all tasks count anyway.
    """
    columns = reader.columns
    labels = columns.labels
    weighs = bool(labels.weights) or columns.weighted
    open_ = [
        column
        for column, task in enumerate(labels.tasks)
        if weighs or task.mask is not None or task.label in labels.partial
    ]
    found, candidates, looked = np.zeros(len(labels.tasks), dtype=bool), 0, 0
    few = Columns({}, labels, weighted=columns.weighted)
    for place in reader.row_groups[:most]:
        if found[open_].all():
            break
        looked += 1
        # A bad row group is an error of the reader's, not of these words.
        with suppress(DataError):
            rows = read_rows(place.file, place.row_group, few)
            counts = ~np.isnan(rows.labels) & (rows.weight > 0)[:, None]
            if rows.task_weight is not None:
                counts &= rows.task_weight > 0
            found |= counts.any(axis=0)
            candidates += len(rows.labels)
    never = [labels.tasks[column] for column in open_ if not found[column]]
    return Unobserved(never, candidates, looked == len(reader.row_groups))


def unobserved_lines(reader: SequenceLogReader, manifest: LogManifest) -> Iterator[str]:
    """A line for each task that no candidate of the training split trains, as far as that is known.

    Raises:
        ConfigError: no candidate of the split counts for any task.
    """
    tasks, counted = reader.columns.labels.tasks, manifest.splits[reader.split].labels
    never, candidates, whole = unobserved(reader)
    if never and whole and len(never) == len(tasks):
        raise ConfigError(
            f"data.log: no candidate of the split {reader.split} is observed by a task and weighs more than "
            "0, so nothing would be trained; look at labels, weights and tasks.<name>.mask"
        )
    for task in never:
        # A label that nobody has is told of by the labels' own counts.
        if task.label in counted and not counted[task.label].observed:
            continue
        mask = f" (mask = {task.settings.mask!r})" if task.mask is not None else ""
        which = "no candidate" if whole else f"none of the first {candidates:,} candidates"
        yield (
            f"tasks.{task.name}: {which} of {reader.split} is observed{mask} and weighs more than 0"
            f"{', so the task is not trained' if whole else ''}"
        )
