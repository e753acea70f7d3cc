"""Histories of a sequence log, by user: what stands for a user-history store in the demo.

A service keeps its users' histories itself and sends them along; nothing here is updated after the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.config.sections import DataConfig
from trainer.data.reader import SequenceLogReader
from trainer.data.row_group import PARQUET_ERRORS, Bags, FeatureIds, Floats, Ints
from trainer.data.rows import UserRows, read_rows
from trainer.log.schema import VOCABULARIES, read_manifest
from trainer.serving.asked import History
from trainer.serving.vocabulary import read_vocabulary

_SPLITS = ("train", "validation", "test")


class _Place(NamedTuple):
    """A user's row in a row group."""

    rows: UserRows
    row: int


@dataclass(frozen=True)
class StoredRequest:
    """A request of the log, with what happened.

    Attributes:
        time: unix seconds; candidates, context: ids; numeric: [c, numbers]; labels: [c, T].
    """

    time: int
    candidates: Mapping[str, Bags]
    context: Mapping[str, Bags]
    numeric: Floats
    labels: Floats


class HistoryStore(Mapping[int, History]):
    """user id -> the longest history that the log has of them. All of the log stays in memory.

    Attributes:
        users: names of the users, whose ids they number, where the log has names; None: users are integers.

    Raises:
        DataError: the log is missing or malformed, or its names are not those of its manifest.
    """

    def __init__(self, log: Path) -> None:
        self.log, self.manifest = log, read_manifest(log)
        self.chunk = self.manifest.clusters.chunk if self.manifest.clusters else 0
        self._places: dict[int, _Place] = {}
        named = self.manifest.named.get("user_id")
        file = log / VOCABULARIES / "user_id.parquet"
        self.users = None if named is None else read_vocabulary(file, named.vocabulary, of_log=True)
        self._names: dict[str, tuple[Ints, pa.Array]] = {}
        data = DataConfig(log=log, clusters=bool(self.chunk))
        for split in _SPLITS:
            if split in self.manifest.splits and self.manifest.splits[split].candidates:
                self._read(SequenceLogReader(data, split, None))

    def _read(self, reader: SequenceLogReader) -> None:
        for place in reader.row_groups:
            rows = read_rows(place.file, place.row_group, reader.columns)
            lengths = np.diff(rows.history_offsets).tolist()
            for row, (user, length) in enumerate(zip(rows.user_id.tolist(), lengths, strict=True)):
                known = self._places.get(user)
                if known is None or length >= _length(known):
                    self._places[user] = _Place(rows, row)

    def __getitem__(self, user: int) -> History:
        rows, row = self._places[user]
        part = _span(rows.history_offsets, row)
        clusters = (None if each is None else each[part] for each in (rows.cluster_size, rows.cluster_time))
        return History(rows.history_time[part], _cut(rows.history, part), *clusters)

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def name(self, user: int) -> str:
        """The user's own name; the number, where the log has no name."""
        named = self.users is not None and 1 <= user <= len(self.users)
        return str(self.users.values[user - 1]) if self.users is not None and named else str(user)

    def behaviors(self, user: int) -> int:
        return _length(self._places[user])

    def requests(self, user: int) -> list[StoredRequest]:
        """The requests that the log holds beside this history, oldest first."""
        rows, row = self._places[user]
        of_user = _span(rows.request_offsets, row)
        found = []
        for r in range(of_user.start, of_user.stop):
            part = _span(rows.candidate_offsets, r)
            found.append(
                StoredRequest(
                    int(rows.request_time[r]),
                    _cut(rows.candidates, part),
                    _cut(rows.context, slice(r, r + 1)),
                    rows.numeric[part],
                    rows.labels[part],
                )
            )
        return found

    def names(self, feature: str, ids: Sequence[int]) -> dict[int, str]:
        """What ids stand for, as far as the log says."""
        if feature not in self._names:
            self._names[feature] = self._vocabulary(feature)
        known, values = self._names[feature]
        if not known.size:
            return {}
        wanted = np.array(list(ids), dtype=np.int64)
        at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        found = wanted == known[at]
        return dict(zip(wanted[found].tolist(), map(str, values.take(at[found]).to_pylist()), strict=True))

    def _vocabulary(self, feature: str) -> tuple[Ints, pa.Array]:
        """Ids in order and their values, as arrays: objects of a large vocabulary would take gigabytes."""
        try:
            table = pq.read_table(self.log / "vocab" / f"{feature}.parquet", columns=["value", "id"])
            table = table.sort_by("id").combine_chunks()
            ids = table.column("id").to_numpy().astype(np.int64)
        except (*PARQUET_ERRORS, KeyError):
            return np.zeros(0, dtype=np.int64), pa.array([], pa.string())
        return ids, table.column("value")


def _span(offsets: np.typing.NDArray[np.int64], row: int) -> slice:
    return slice(int(offsets[row]), int(offsets[row + 1]))


def _length(place: _Place) -> int:
    part = _span(place.rows.history_offsets, place.row)
    length: int = part.stop - part.start
    return length


def _cut(features: FeatureIds, part: slice) -> dict[str, Bags]:
    found = {
        name: Bags(ids[part].astype(np.int64))
        for name, ids in zip(features.single, features.ids, strict=True)
    }
    for name, bags in features.multi.items():
        values, lengths = bags.select(part)
        found[name] = Bags(values.astype(np.int64), np.concatenate([[0], np.cumsum(lengths)]))
    return found
