"""Histories of a sequence log, by user, and whose a request means: a user-history store for the demo.

A service keeps its users' histories itself and sends them along; nothing here is updated after the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.config.sections import DataConfig
from trainer.data.reader import SequenceLogReader
from trainer.data.row_group import Ints
from trainer.data.rows import UserRows, read_rows
from trainer.log.arrow import PARQUET_ERRORS, is_text
from trainer.log.schema import VOCABULARIES, read_manifest
from trainer.log.vocabulary import read_values
from trainer.serving.request import History, RequestError
from trainer.serving.vocabulary import Vocabulary, ids_of
from trainer.storage.ranges import parquet_source


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
        # user id -> a row group, and the user's row in it
        self._places: dict[int, tuple[UserRows, int]] = {}
        named = self.manifest.named.get("user_id")
        self.users: Vocabulary | None = None
        if named is not None:
            names = log / VOCABULARIES / "user_id.parquet"
            self.users = Vocabulary(read_values(names, named.vocabulary, of_log=True))
        self._names: dict[str, tuple[Ints, pa.Array]] = {}
        data = DataConfig(log=log, clusters=bool(self.chunk))
        for split in ("train", "validation", "test"):
            if split not in self.manifest.splits or not self.manifest.splits[split].candidates:
                continue
            reader = SequenceLogReader(data, split, None)
            for group in reader.row_groups:
                rows = read_rows(group.file, group.row_group, reader.columns)
                lengths = np.diff(rows.history_offsets).tolist()
                for row, (user, length) in enumerate(zip(rows.user_id.tolist(), lengths, strict=True)):
                    if user not in self._places or length >= self.behaviors(user):
                        self._places[user] = rows, row

    def __getitem__(self, user: int) -> History:
        rows, row = self._places[user]
        part = slice(*rows.history_offsets[row : row + 2].tolist())
        clusters = (None if each is None else each[part] for each in (rows.cluster_size, rows.cluster_time))
        features = {name: bags.part(part) for name, bags in rows.history.items()}
        return History(rows.history_time[part], features, *clusters)

    def __iter__(self) -> Iterator[int]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def name(self, user: int) -> str:
        """The user's own name; the number, where the log has no name."""
        if self.users is None or not 1 <= user <= len(self.users):
            return str(user)
        return str(self.users.values[user - 1])

    def behaviors(self, user: int) -> int:
        rows, row = self._places[user]
        return int(rows.history_offsets[row + 1] - rows.history_offsets[row])

    def requests(self, user: int) -> tuple[UserRows, range]:
        """The requests that the log holds beside this history, oldest first, and the rows they are in."""
        rows, row = self._places[user]
        return rows, range(*rows.request_offsets[row : row + 2].tolist())

    def names(self, feature: str, ids: Sequence[int]) -> dict[int, str]:
        """What ids stand for, as far as the log says."""
        if feature not in self._names:
            # Arrays, in the order of the ids: objects of a large vocabulary would take gigabytes.
            try:
                file = self.log / VOCABULARIES / f"{feature}.parquet"
                table = pq.read_table(parquet_source(file), columns=["value", "id"])
                table = table.sort_by("id").combine_chunks()
                self._names[feature] = table.column("id").to_numpy().astype(np.int64), table.column("value")
            except (*PARQUET_ERRORS, KeyError):
                self._names[feature] = np.zeros(0, dtype=np.int64), pa.array([], pa.string())
        known, values = self._names[feature]
        if not known.size:
            return {}
        wanted = np.array(list(ids), dtype=np.int64)
        at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        hit = wanted == known[at]
        return dict(zip(wanted[hit].tolist(), map(str, values.take(at[hit]).to_pylist()), strict=True))


def as_user(given: int | str) -> pa.Array:
    """A user as an array of one value."""
    return pa.array([given], pa.large_string() if isinstance(given, str) else pa.int64())


def known_user(stored: Mapping[int, History], user: pa.Array, names: Vocabulary | None, place: str) -> int:
    """The log's number of a user that has a history.

    Args:
        user: one value.
        names: of the users of the log; None: the request, or the log, has numbers.
        place: of the user in the request, for messages.

    Raises:
        RequestError: 422 where it is of another type than the log's users, 404 where there is no such user.
    """
    text = is_text(user.type)
    if text != (names is not None and names.text):
        mine, theirs = ("text", "integers") if text else ("an integer", "text")
        raise RequestError(422, f"{place}: is {mine}, and the users of the histories' log are {theirs}")
    number = int(user[0].as_py() if names is None else ids_of(names, user, place)[0])
    if number not in stored or (names is not None and not number):
        # A message shows the first 80 characters of a name.
        spelled = repr(pc.utf8_slice_codeunits(user, 0, 80)[0].as_py()) if text else str(user[0])
        raise RequestError(404, f"{place}: no stored history of user {spelled}")
    return number
