"""Histories of a sequence log, by user, and whose a request means: a user-history store for the demo.

A service keeps its users' histories itself and sends them along; nothing here is updated after the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.config.sections import DataConfig
from trainer.data.reader import SequenceLogReader
from trainer.data.row_group import Bags, FeatureIds, Floats, Ints
from trainer.data.rows import UserRows, read_rows
from trainer.log.arrow import PARQUET_ERRORS, is_text
from trainer.log.schema import VOCABULARIES, read_manifest
from trainer.serving.request import History, RequestError
from trainer.serving.vocabulary import Vocabulary, ids_of, read_vocabulary

_SPLITS = ("train", "validation", "test")
# Characters of a name that a message shows.
_SHOWN = 80


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
        return History(rows.history_time[part], _features(rows.history, part), *clusters)

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
        return [_stored_request(rows, r) for r in range(of_user.start, of_user.stop)]

    def names(self, feature: str, ids: Sequence[int]) -> dict[int, str]:
        """What ids stand for, as far as the log says."""
        if feature not in self._names:
            self._names[feature] = self._vocabulary(feature)
        known, values = self._names[feature]
        if not known.size:
            return {}
        wanted = np.array(list(ids), dtype=np.int64)
        at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        hit = wanted == known[at]
        return dict(zip(wanted[hit].tolist(), map(str, values.take(at[hit]).to_pylist()), strict=True))

    def _vocabulary(self, feature: str) -> tuple[Ints, pa.Array]:
        """Ids in order and their values, as arrays: objects of a large vocabulary would take gigabytes."""
        try:
            table = pq.read_table(self.log / "vocab" / f"{feature}.parquet", columns=["value", "id"])
            table = table.sort_by("id").combine_chunks()
            ids = table.column("id").to_numpy().astype(np.int64)
        except (*PARQUET_ERRORS, KeyError):
            return np.zeros(0, dtype=np.int64), pa.array([], pa.string())
        return ids, table.column("value")


def _stored_request(rows: UserRows, r: int) -> StoredRequest:
    part = _span(rows.candidate_offsets, r)
    return StoredRequest(
        int(rows.request_time[r]),
        _features(rows.candidates, part),
        _features(rows.context, slice(r, r + 1)),
        rows.numeric[part],
        rows.labels[part],
    )


def _span(offsets: np.typing.NDArray[np.int64], row: int) -> slice:
    return slice(int(offsets[row]), int(offsets[row + 1]))


def _length(place: _Place) -> int:
    part = _span(place.rows.history_offsets, place.row)
    length: int = part.stop - part.start
    return length


def _features(features: FeatureIds, part: slice) -> dict[str, Bags]:
    return {name: features[name].part(part) for name in features}


def as_user(given: int | str) -> pa.Array:
    """A user as an array of one value."""
    return pa.array([given], pa.large_string() if isinstance(given, str) else pa.int64())


def number_sent(user: pa.Array | None) -> int:
    """What stands for a user whose history is sent along, and who need not be known: 0 for a name."""
    return 0 if user is None or is_text(user.type) else int(user[0].as_py())


def stored_history(
    stored: Mapping[int, History], user: pa.Array | None, names: Vocabulary | None, place: str
) -> tuple[int, History]:
    """The number and the history of a user.

    Args:
        user: one value; None: the request names nobody.
        names: of the users of the log; None: the request, or the log, has numbers.
        place: of the request, for messages.

    Raises:
        RequestError: 422 without a user or of another type than the log's, 404 for an unknown one.
    """
    if user is None:
        raise RequestError(422, f"{place}: give a history, or a user_id where the server has histories")
    if not stored:
        raise RequestError(422, f"{place}.history: missing, and this server was started without --histories")
    number = known_user(stored, user, names, f"{place}.user_id")
    return number, stored[number]


def known_user(stored: Mapping[int, History], user: pa.Array, names: Vocabulary | None, place: str) -> int:
    """The log's number of a user that has a history.

    Raises:
        RequestError: 422 where it is of another type than the log's users, 404 where there is no such user.
    """
    number = _number_of(user, names, place)
    if number not in stored or (names is not None and not number):
        raise RequestError(404, f"{place}: no stored history of user {_spelled(user)}")
    return number


def _number_of(user: pa.Array, names: Vocabulary | None, place: str) -> int:
    text = is_text(user.type)
    if text != (names is not None and names.text):
        mine, theirs = ("text", "integers") if text else ("an integer", "text")
        raise RequestError(422, f"{place}: is {mine}, and the users of the histories' log are {theirs}")
    return int(user[0].as_py() if names is None else ids_of(names, user, place)[0])


def _spelled(user: pa.Array) -> str:
    if not is_text(user.type):
        return str(user[0])
    name: str = pc.utf8_slice_codeunits(user, 0, _SHOWN)[0].as_py()
    return repr(name)
