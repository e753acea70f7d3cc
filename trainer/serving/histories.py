"""Histories of a sequence log, by user, and whose a request means: a user-history store for the demo.

A service keeps its users' histories itself and sends them along; nothing here is updated after the start. The
log stays where it is: memory holds where each user's row lies, and the row groups that were read last.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embeddings.errors import DataError
from trainer.config.sections import DataConfig
from trainer.data.files import READERS, RowGroup, ahead
from trainer.data.labels import TaskLabels
from trainer.data.reader import SequenceLogReader
from trainer.data.row_group import read_footer, read_group
from trainer.data.rows import Columns, UserRows, read_rows
from trainer.log.arrow import PARQUET_ERRORS, is_text
from trainer.log.bags import Ints
from trainer.log.known_values import KnownValues, known_values
from trainer.log.schema import VOCABULARIES, read_manifest
from trainer.sealed_folder import scratch
from trainer.serving.request import History, RequestError
from trainer.serving.vocabulary import ids_of
from trainer.storage.fetched import own_cache
from trainer.storage.ranges import parquet_source
from trainer.storage.sorted_rows import KEY, Rows, sort_rows

# Bytes of decoded row groups that stay in memory; the one that was read last stays, whatever its size.
_CACHED = 256 << 20
_MOST_FOOTERS = 64
# Values of a vocabulary file that are kept for names; of larger ones, those that are asked for are read.
_KEPT_NAMES = 64 << 20


# Of a row: user, row group, row in it, behaviors.
_PLACED = {KEY: np.int64, "group": np.int32, "row": np.int32, "behaviors": np.int64}


class HistoryStore(Mapping[int, History]):
    """user id -> the longest history that the log has of them, read when it is asked for.

    Takes 24 bytes a user, in memory up to a million of them and else in a file that is mapped, and at most
    `cached` bytes of memory for row groups that were read last. May be used from several threads.

    Args:
        log: a sequence log, whose files stay as they are while this lives.
        cached: bytes of decoded row groups that stay in memory.
        cache: a folder for what is mapped instead of held where users are many; None: the user's caches.

    Attributes:
        users: names of the users, whose ids they number, where the log has names; None: users are integers.

    Raises:
        DataError: the log is missing or malformed, or its names are not those of its manifest.
    """

    def __init__(self, log: Path, cached: int = _CACHED, cache: Path | None = None) -> None:
        self.log, self.manifest = log, read_manifest(log)
        self.chunk = self.manifest.clusters.chunk if self.manifest.clusters else 0
        named = self.manifest.named.get("user_id")
        self.users: KnownValues | None = None
        if named is not None:
            names = log / VOCABULARIES / "user_id.parquet"
            self.users = known_values(names, named.vocabulary, cache, of_log=True)
        self._names: dict[str, tuple[Ints, pa.Array]] = {}
        data = DataConfig(log=log, clusters=bool(self.chunk))
        places: list[RowGroup] = []
        # The same of all splits.
        self._columns: Columns | None = None
        for split in ("train", "validation", "test"):
            if split not in self.manifest.splits or not self.manifest.splits[split].candidates:
                continue
            reader = SequenceLogReader(data, split, None)
            places += reader.row_groups
            self._columns = reader.columns
        self._places, self._index = places, _Index.of(places, cache)
        self._cache = _RowCache(cached)

    def __getitem__(self, user: int) -> History:
        group, row = self._index.place(user)
        rows = self._rows(group, False)
        part = slice(*rows.history_offsets[row : row + 2].tolist())
        clusters = (None if each is None else each[part] for each in (rows.cluster_size, rows.cluster_time))
        features = {name: bags.part(part) for name, bags in rows.history.items()}
        return History(rows.history_time[part], features, *clusters)

    def __contains__(self, user: object) -> bool:
        return isinstance(user, int) and self._index.find(user) is not None

    def __iter__(self) -> Iterator[int]:
        """Ascending."""
        return (int(user) for user in self._index.user)

    def __len__(self) -> int:
        return int(self._index.user.size)

    def first(self, count: int) -> list[int]:
        """The users with the smallest ids."""
        return list(islice(self, count))

    def name(self, user: int) -> str:
        """The user's own name; the number, where the log has no name."""
        if self.users is None or not 1 <= user <= len(self.users):
            return str(user)
        return str(self.users.values[user - 1])

    def behaviors(self, user: int) -> int:
        at = self._index.find(user)
        if at is None:
            raise KeyError(user)
        return int(self._index.behaviors[at])

    def requests(self, user: int) -> tuple[UserRows, range]:
        """The requests that the log holds beside this history, oldest first, and the rows they are in."""
        group, row = self._index.place(user)
        rows = self._rows(group, True)
        return rows, range(*rows.request_offsets[row : row + 2].tolist())

    def names(self, feature: str, ids: Sequence[int]) -> dict[int, str]:
        """What ids stand for, as far as the log says."""
        wanted = np.unique(np.array(list(ids), dtype=np.int64))
        if feature not in self._names:
            file, nothing = self.log / VOCABULARIES / f"{feature}.parquet", np.zeros(0, dtype=np.int64)
            try:
                if file.stat().st_size > _KEPT_NAMES:
                    return dict(_names_in_file(file, wanted))
                # Arrays, in the order of the ids: objects of a large vocabulary would take gigabytes.
                table = pq.read_table(parquet_source(file), columns=["value", "id"])
                table = table.sort_by("id").combine_chunks()
                self._names[feature] = table.column("id").to_numpy().astype(np.int64), table.column("value")
            except (*PARQUET_ERRORS, KeyError):
                self._names[feature] = nothing, pa.array([], pa.string())
        return _named(wanted, *self._names[feature])

    def _rows(self, group: int, whole: bool) -> UserRows:
        """A row group: its histories, or all that it holds.

        Raises:
            RequestError: 503 where it cannot be read.
        """
        assert self._columns is not None
        columns = self._columns if whole else _of_histories(self._columns)
        try:
            return self._cache.read(self._places[group], columns, whole)
        except DataError as error:
            raise RequestError(503, f"the stored histories cannot be read: {error}") from None


class _Index(NamedTuple):
    """Where the longest row of each of U users lies: users ascending, row group, row in it, its behaviors."""

    user: Ints
    group: npt.NDArray[np.int32]
    row: npt.NDArray[np.int32]
    behaviors: Ints

    @staticmethod
    def of(places: Sequence[RowGroup], cache: Path | None) -> _Index:
        """Read two columns of all row groups. Of rows that are equally long, the last one counts.

        Raises:
            DataError: a row group cannot be read, or `cache` cannot be written.
            ConfigError: many users, and no folder for a cache; see `own_cache`.
        """
        with ExitStack() as held:
            lengths = partial(_lengths, lru_cache(READERS)(read_footer))
            parts = (_placed(number, *found) for number, found in enumerate(ahead(lengths, places)))
            try:
                rows = sort_rows(
                    parts,
                    _PLACED,
                    lambda: held.enter_context(scratch(own_cache(cache), "histories")),
                    _longest,
                )
            except OSError as error:
                problem = (
                    f"the places of histories cannot be kept in {own_cache(cache)}: {error.strerror or error}"
                )
                raise DataError(f"{problem}; make room there, or name another --cache") from None
        return _Index(*(rows[name] for name in _PLACED))

    def find(self, user: int) -> int | None:
        """The user's place in these arrays."""
        # Beyond 64 bits there is nobody, and no number to compare with.
        if not self.user.size or not -(1 << 63) <= user < 1 << 63:
            return None
        at = int(np.searchsorted(self.user, user))
        return at if at < self.user.size and int(self.user[at]) == user else None

    def place(self, user: int) -> tuple[int, int]:
        """Row group and row; KeyError for an unknown user."""
        at = self.find(user)
        if at is None:
            raise KeyError(user)
        return int(self.group[at]), int(self.row[at])


class _RowCache:
    """Decoded row groups, those that were used last."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._rows: OrderedDict[tuple[RowGroup, bool], UserRows] = OrderedDict()
        self._footers: OrderedDict[Path, pq.FileMetaData] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, place: RowGroup, columns: Columns, whole: bool) -> UserRows:
        """Raises DataError where the row group is missing or damaged."""
        key = place, whole
        with self._lock:
            if key in self._rows:
                self._rows.move_to_end(key)
                return self._rows[key]
            footer = self._footers.get(place.file)
        if footer is None:
            footer = read_footer(place.file)
        # Two threads may read the same one at once, which does no harm.
        rows = read_rows(place.file, place.row_group, columns, footer)
        with self._lock:
            self._footers[place.file] = footer
            if len(self._footers) > _MOST_FOOTERS:
                self._footers.popitem(last=False)
            if key not in self._rows:
                self._rows[key] = rows
                self._held += _bytes_of(rows)
            while self._held > self._most and len(self._rows) > 1:
                self._held -= _bytes_of(self._rows.popitem(last=False)[1])
        return rows


def _bytes_of(rows: UserRows) -> int:
    arrays = [value for value in vars(rows).values() if isinstance(value, np.ndarray)]
    for features in (rows.history, rows.candidates, rows.context):
        arrays.append(features.ids)
        arrays += [
            part
            for bags in features.multi.values()
            for part in (bags.values, bags.offsets)
            if part is not None
        ]
    return sum(array.nbytes for array in arrays)


def _placed(group: int, user: Ints, behaviors: Ints) -> Rows:
    """The rows of a row group, for `_PLACED`."""
    values = user, np.full(user.size, group), np.arange(user.size), behaviors
    return dict(zip(_PLACED, values, strict=True))


def _longest(rows: Rows) -> Rows:
    """The longest row of each user, of rows sorted by user."""
    # A stable order: by user, then by length, then as they are stored.
    order = np.lexsort((rows["behaviors"], rows[KEY]))
    user = rows[KEY][order]
    last = order[np.append(user[1:] != user[:-1], True)[: order.size]]
    return {name: values[last] for name, values in rows.items()}


def _lengths(footer: Callable[[Path], pq.FileMetaData], place: RowGroup) -> tuple[Ints, Ints]:
    """Users of a row group, and how many behaviors each has there."""
    names = ["user_id", "history_timestamp"]
    group = read_group(place.file, place.row_group, names, footer(place.file))
    return group.ints("user_id"), np.diff(group.lists("history_timestamp")[0])


def _of_histories(columns: Columns) -> Columns:
    """The columns of histories alone."""
    features = {
        name: info.model_copy(update={"side": "history"})
        for name, info in columns.features.items()
        if info.of_behaviors
    }
    return Columns(features, TaskLabels((), ()), chunk=columns.chunk)


def _named(wanted: Ints, known: Ints, values: pa.Array) -> dict[int, str]:
    if not known.size:
        return {}
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    hit = wanted == known[at]
    return dict(zip(wanted[hit].tolist(), map(str, values.take(at[hit]).to_pylist()), strict=True))


def _names_in_file(file: Path, wanted: Ints) -> Iterator[tuple[int, str]]:
    """The names of ids, ascending, from the row groups that hold them: ids count from 1, row by row."""
    with pq.ParquetFile(parquet_source(file)) as parquet:
        first = 1
        for group in range(parquet.metadata.num_row_groups):
            stop = first + parquet.metadata.row_group(group).num_rows
            inside = wanted[slice(*np.searchsorted(wanted, [first, stop]).tolist())]
            if inside.size:
                table = parquet.read_row_group(group, columns=["value", "id"])
                known = table.column("id").to_numpy()
                yield from _named(inside, known, table.column("value")).items()
            first = stop


def as_user(given: int | str) -> pa.Array:
    """A user as an array of one value."""
    return pa.array([given], pa.large_string() if isinstance(given, str) else pa.int64())


def known_user(stored: Mapping[int, History], user: pa.Array, names: KnownValues | None, place: str) -> int:
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
