"""Scores of a split that are more than memory holds: in files, measured a part at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embeddings.errors import DataError
from trainer.quality.metrics import Metrics, group_keys
from trainer.quality.runs import Merged, RowFile
from trainer.quality.scored import KEYS, Ints, Key, Scored, Scores, numbers_of, scored_of, tasks_of
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
        self._weighted = any(name.startswith("weight_") for name in self._names)
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
        """Small parts are measured in memory, as many at a time as it holds; large ones in a stream.

        However many parts there are, all scores are read twice: to count, and to write each part, or as many
        as memory holds, into a file of its own.
        """
        sizes: dict[int, int] = {}
        for chunk in self.chunks():
            for each, count in zip(*np.unique(key(chunk), return_counts=True), strict=True):
                sizes[int(each)] = sizes.get(int(each), 0) + int(count)
        packs = list(_packed(sizes, IN_MEMORY))
        if not packs:
            return {}
        if len(packs) == 1 and len(sizes) == 1 and self.size > IN_MEMORY:
            (number,) = sizes
            return {number: {self.tasks[task]: self.assessed(task).metrics() for task in tasks}}
        names = tuple(self.tasks[task] for task in tasks)
        kinds = ["score", "label", *(["weight"] if self._weighted else [])]
        row = np.dtype([*_OF_PART, *((kind, "<f4", (len(tasks),)) for kind in kinds)])
        files = [RowFile(self._scratch / f"part-{number:06d}", row) for number in range(len(packs))]
        try:
            self._scatter(key, tasks, packs, files)
            found: dict[int, dict[str, Metrics]] = {}
            for numbers, file in zip(packs, files, strict=True):
                if sizes[numbers[0]] <= IN_MEMORY:
                    rows = np.concatenate(list(file.written()))
                    found |= _scored(rows, names).metrics_by(_part, range(len(tasks)))
                else:
                    pieces = partial(_pieces, file, names)
                    found[numbers[0]] = {
                        name: self._assess(task, pieces).metrics() for task, name in enumerate(names)
                    }
                file.remove()
            return found
        finally:
            for file in files:
                file.remove()

    def _scatter(
        self, key: Key, tasks: Sequence[int], packs: Sequence[Sequence[int]], files: Sequence[RowFile]
    ) -> None:
        """Write the candidates of each pack of parts into its file; a piece of whole users at a time."""
        numbers = np.array([number for pack in packs for number in pack], dtype=np.int64)
        pack_of = np.repeat(np.arange(len(packs)), [len(pack) for pack in packs])
        for chunk in self.chunks():
            keys = key(chunk)
            pack = pack_of[np.searchsorted(numbers, keys)]
            order = np.argsort(pack, kind="stable")
            rows = np.empty(chunk.size, files[0].of_row)
            rows["user"], rows["request"], rows["part"] = chunk.user_id, chunk.request_id, keys
            rows["score"], rows["label"] = chunk.score[:, list(tasks)], chunk.label[:, list(tasks)]
            if chunk.weight is not None:
                rows["weight"] = chunk.weight[:, list(tasks)]
            each, starts = np.unique(pack[order], return_index=True)
            for number, some in zip(each.tolist(), np.split(order, starts[1:]), strict=True):
                files[number].write(rows[some])

    def assessed(self, task: int) -> Assessment:
        """All candidates of a task, with what each user adds to errors."""
        return self._assess(task, self.chunks)

    def _assess(self, task: int, chunks: Callable[[], Iterator[Scored]]) -> Assessment:
        """Metrics of candidates that pass by in pieces of whole users, the same ones each time."""
        return assess(
            lambda: (part_of(chunk.observed(task), task) for chunk in chunks()), True, self._scratch
        )


# What a candidate's metrics follow from, besides its scores and labels; `part` is the key of its part.
_OF_PART = (("user", "<i8"), ("request", "<i8"), ("part", "<i8"))


def _part(rows: Scored) -> Ints:
    assert rows.domain is not None
    return rows.domain


def _pieces(file: RowFile, tasks: tuple[str, ...]) -> Iterator[Scored]:
    return (_scored(rows, tasks) for rows in file.written())


def _scored(rows: npt.NDArray[Any], tasks: tuple[str, ...]) -> Scored:
    """Candidates of parts, with the part as their domain."""
    nothing = np.zeros(rows.size, dtype=np.int64)
    keys = (rows["user"], rows["request"], nothing, nothing, nothing)
    weight = rows["weight"] if "weight" in (rows.dtype.names or ()) else None
    return Scored(rows["score"], rows["label"], *keys, tasks, rows["part"], weight)


def joined(parts: Sequence[Scored]) -> Scored:
    """The candidates of all parts, one after another."""
    names = ["score", "label", *KEYS]
    names += [name for name in ("domain", "weight") if getattr(parts[0], name) is not None]
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in names
    }
    return replace(parts[0], **columns)


def part_of(chunk: Scored, task: int) -> Part:
    """What `assess` takes of whole users."""
    groups, users = group_keys(chunk.user_id, chunk.request_id), group_keys(chunk.user_id)
    weight = None if chunk.weight is None else chunk.weight[:, task]
    return Part(chunk.score[:, task], chunk.label[:, task], groups, users, weight)


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
