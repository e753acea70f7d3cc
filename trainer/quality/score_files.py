"""Scores of a split that are more than memory holds: in files, measured a part at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embeddings.errors import DataError
from trainer.quality.metrics import Metrics, group_keys
from trainer.quality.runs import Merged
from trainer.quality.scored import KEYS, Key, Scored, Scores, numbers_of, scored_of, tasks_of
from trainer.quality.streamed import Assessment, Part, assess

# Candidates that are measured in memory: 230 bytes each, a gigabyte.
IN_MEMORY = 1 << 22


class ScoreFiles(Scores):
    """Scores in Parquet files of `columns_of`, each sorted or not, of different candidates.

    Args:
        files: at least one; scratch: a folder for what is measured in pieces.

    Raises:
        DataError: a file is missing, malformed, or holds no scores.
    """

    def __init__(self, files: Sequence[Path], scratch: Path) -> None:
        self._merged, self._scratch = Merged(files), scratch
        self._names = numbers_of(self._merged.names)
        lacking = sorted(set(KEYS) - set(self._names))
        try:
            self.tasks = tasks_of(self._names)
        except KeyError as error:
            raise DataError(f"holds no scores of `tandemrec evaluate`: {error}", file=files[0]) from None
        if lacking:
            raise DataError("no such column in the file", file=files[0], column=lacking[0])

    @property
    def size(self) -> int:
        return self._merged.rows

    def chunks(self) -> Iterator[Scored]:
        for columns in self._merged(self._names):
            yield scored_of({name: columns[name] for name in self._names})

    def metrics_by(self, key: Key, tasks: Sequence[int]) -> dict[int, dict[str, Metrics]]:
        """Small parts are measured in memory, as many at a time as it holds; large ones in a stream."""
        sizes: dict[int, int] = {}
        for chunk in self.chunks():
            for each, count in zip(*np.unique(key(chunk), return_counts=True), strict=True):
                sizes[int(each)] = sizes.get(int(each), 0) + int(count)
        found: dict[int, dict[str, Metrics]] = {}
        for numbers in _packed(sizes, IN_MEMORY):
            if sizes[numbers[0]] <= IN_MEMORY:
                found |= self._gathered(key, numbers).metrics_by(key, tasks)
                continue
            (number,) = numbers
            found[number] = {
                self.tasks[task]: self._assess(task, lambda part: key(part) == number).metrics()  # noqa: B023
                for task in tasks
            }
        return dict(sorted(found.items()))

    def _gathered(self, key: Key, numbers: Sequence[int]) -> Scored:
        """The candidates of some parts."""
        parts = [chunk.part(np.isin(key(chunk), numbers)) for chunk in self.chunks()]
        return joined(parts)

    def assessed(self, task: int) -> Assessment:
        """All candidates of a task, with what each user adds to errors."""
        return self._assess(task, lambda part: np.ones(part.size, dtype=np.bool_))

    def _assess(self, task: int, chosen: Callable[[Scored], npt.NDArray[np.bool_]]) -> Assessment:
        def parts() -> Iterator[Part]:
            for chunk in self.chunks():
                yield part_of(chunk.part(chosen(chunk)).observed(task), task)

        return assess(parts, True, self._scratch)


def joined(parts: Sequence[Scored]) -> Scored:
    """The candidates of all parts, one after another."""
    names = ["score", "label", *KEYS, *(["domain"] if parts[0].domain is not None else [])]
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in names
    }
    return replace(parts[0], **columns)


def part_of(chunk: Scored, task: int) -> Part:
    """What `assess` takes of whole users."""
    groups, users = group_keys(chunk.user_id, chunk.request_id), group_keys(chunk.user_id)
    return Part(chunk.score[:, task], chunk.label[:, task], groups, users)


def _packed(sizes: dict[int, int], most: int) -> Iterator[list[int]]:
    """Keys in their order, as many together as come to `most`; a larger one alone."""
    batch: list[int] = []
    held = 0
    for number, size in sorted(sizes.items()):
        if batch and held + size > most:
            yield batch
            batch, held = [], 0
        batch.append(number)
        held += size
    if batch:
        yield batch
