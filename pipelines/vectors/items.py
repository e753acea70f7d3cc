"""The items of a log, each once: found among its behaviors and candidates in bounded memory.

DuckDB groups and sorts them, in files of a scratch folder where they are more than fit in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from embeddings.errors import ConfigError, DataError
from trainer.data.files import check_files
from trainer.data.labels import TaskLabels
from trainer.data.row_group import FeatureIds
from trainer.data.rows import Columns, UserRows, read_rows
from trainer.log.bags import Bags, Ints
from trainer.log.schema import FeatureInfo, LogManifest
from trainer.ranks.machine import cores
from trainer.snapshot import Snapshot

# Bytes that DuckDB may take before it writes to files, and items that are handed out at once.
_MEMORY, SOME_ITEMS = "1GiB", 1 << 15
_ITEM, _TIME, _CANDIDATE = "item", "newest", "of_candidate"


class Items(NamedTuple):
    """Some items, in the order of the output.

    Attributes:
        item: int64 [n], their ids; group: int64 [n], those of their groups, None without groups.
        occurrences: int64 [n], behaviors and candidates that are this item.
        features: feature of the log -> ids, empty bags where nothing says what they are.
    """

    item: Ints
    group: Ints | None
    occurrences: Ints
    features: Mapping[str, Bags]


@dataclass(frozen=True)
class ItemColumns:
    """What is read of a log to know its items.

    Attributes:
        item, group: the features that name an item and, if not empty, its group.
        features: those of items that the model reads, and `item`, as in the log's manifest.
        columns: for reading row groups.
    """

    item: str
    group: str
    features: Mapping[str, FeatureInfo]
    columns: Columns

    @staticmethod
    def of(manifest: LogManifest, log: Path, snapshot: Snapshot, item: str, group: str) -> ItemColumns:
        """Raises:
        ConfigError: `item` is no feature with one id each. DataError: the log is of another vocabulary.
        """
        info = manifest.features.get(item)
        if info is None or info.multi or info.encoder is not None or info.side == "history":
            features = manifest.features.items()
            fit = [n for n, i in features if not i.multi and i.encoder is None and i.side != "history"]
            problem = f"--item {item}: no feature of candidates in {log} with one id each"
            raise ConfigError(f"{problem}; it has {', '.join(fit) or 'none'}")
        snapshot.check_vocabularies({**manifest.features, **manifest.context}, log)
        bounds, wanted = {item: info.bound, **snapshot.id_bounds()}, snapshot.manifest.inputs
        names = [
            n for n, i in manifest.features.items() if i.side != "history" and (n in wanted or n == item)
        ]
        of_tables = [n for n, i in manifest.table_features.items() if n in names or i.field in names]
        rows = {name: bounds.get(name, manifest.table_features[name].rows) for name in of_tables}
        read = Columns.of(manifest, rows, tasks=())
        columns = replace(read, context={}, numeric=(), weighted=False, labels=TaskLabels((), ()))
        return ItemColumns(item, group, {name: manifest.features[name] for name in names}, columns)

    @property
    def of_candidates_alone(self) -> list[str]:
        """Features that only candidates have."""
        return [name for name, info in self.features.items() if not info.of_behaviors]

    def stored(self, name: str) -> str:
        """The column of a feature in DuckDB: a number, whatever its name."""
        return f"f{list(self.features).index(name)}"


class ItemCatalogue:
    """The items of a log.

    An item is what its newest behavior or candidate says; where candidates have features that behaviors lack,
    what its newest candidate says, if it ever was one.

    Args:
        wanted: what is read; folder: an empty one, for what does not fit in memory.

    Attributes:
        counts: `items`; `conflicts`, those that had several values of a feature; `unknown_occurrences`, of
            id 0, which stands for no item; `never_candidates`, where candidates have features of their own.
    """

    def __init__(self, wanted: ItemColumns, folder: Path) -> None:
        import duckdb

        self._wanted, self.counts = wanted, dict[str, int]()
        config: dict[str, Any] = {
            "memory_limit": _MEMORY, "threads": cores(), "temp_directory": str(folder / "spill"),
            "preserve_insertion_order": False,
        }  # fmt: skip
        self._duck: Any = duckdb.connect(str(folder / "items.duckdb"), config=config)
        columns = [f"{self._wanted.stored(n)} {'BIGINT[]' if i.multi else 'BIGINT'}" for n, i in self._infos]
        self._duck.execute(
            f"CREATE TABLE variants ({_ITEM} BIGINT, {', '.join(columns)}, {_CANDIDATE} BOOLEAN, "
            f"{_TIME} BIGINT, seen BIGINT)"
        )

    @property
    def _infos(self) -> list[tuple[str, FeatureInfo]]:
        return list(self._wanted.features.items())

    @property
    def _stored(self) -> list[str]:
        return [self._wanted.stored(name) for name, _ in self._infos]

    def collect(self, log: Path, manifest: LogManifest) -> None:
        """Read all splits of the log.

        Raises:
            DataError: it is damaged, or has no item.
        """
        for split in manifest.splits:
            for place in check_files(log, manifest, split, (0, 1)) if manifest.holds(split) else ():
                self.add(read_rows(place.file, place.row_group, self._wanted.columns))
        self._count()
        if not self.counts["items"]:
            raise DataError(f"has no {self._wanted.item} that is known", file=log)

    def add(self, rows: UserRows) -> None:
        """Behaviors and candidates of a row group."""
        times = np.repeat(rows.request_time, np.diff(rows.candidate_offsets))
        for ids, at, of_candidate in (
            (rows.history, rows.history_time, False),
            (rows.candidates, times, True),
        ):
            if at.size and (of_candidate or self._wanted.item in ids):
                # DuckDB finds it by the name of this variable.
                events = self._table(ids, at, of_candidate)
                keys = ", ".join([_ITEM, *self._stored, _CANDIDATE])
                self._duck.register("events", events)
                query = f"SELECT {keys}, max({_TIME}), count(*) FROM events GROUP BY {keys}"
                self._duck.execute(f"INSERT INTO variants {query}")
                self._duck.unregister("events")

    def _table(self, ids: FeatureIds, times: Ints, of_candidate: bool) -> pa.Table:
        columns = {_ITEM: pa.array(ids[self._wanted.item].values.astype(np.int64))}
        for name, info in self._infos:
            kind = pa.list_(pa.int64()) if info.multi else pa.int64()
            columns[self._wanted.stored(name)] = (
                _arrow(ids[name], info.multi) if name in ids else pa.nulls(times.size, kind)
            )
        columns[_CANDIDATE] = pa.array(np.full(times.size, of_candidate))
        return pa.table({**columns, _TIME: pa.array(times)})

    def _count(self) -> None:
        differ = " OR ".join(f"min({name}) <> max({name})" for name in self._stored)
        known = "" if self._wanted.features[self._wanted.item].raw else f"WHERE {_ITEM} <> 0"
        per_item = (
            f"SELECT {differ} AS conflict, bool_or({_CANDIDATE}) AS candidate FROM variants {known} "
            f"GROUP BY {_ITEM}"
        )
        row = self._row(
            "SELECT count(*), coalesce(sum(conflict::INT), 0), coalesce(sum((NOT candidate)::INT), 0) "
            f"FROM ({per_item})"
        )
        self.counts = {"items": int(row[0]), "conflicts": int(row[1])}
        if self._wanted.of_candidates_alone:
            self.counts["never_candidates"] = int(row[2])
        if known:
            unknown = f"SELECT coalesce(sum(seen), 0) FROM variants WHERE {_ITEM} = 0"
            self.counts["unknown_occurrences"] = int(self._row(unknown)[0])

    def _row(self, query: str) -> Any:
        # All of it is fetched: DuckDB refuses other queries before.
        return self._duck.execute(query).fetchall()[0]

    def stream(self) -> Iterator[Items]:
        """All items, by group and id, both ascending."""
        wanted = self._wanted
        order = [f"{_CANDIDATE} DESC"] if wanted.of_candidates_alone else []
        order += [f"{name} DESC NULLS LAST" for name in (_TIME, *self._stored)]
        known = "" if wanted.features[wanted.item].raw else f"WHERE {_ITEM} <> 0"
        group = f"coalesce({wanted.stored(wanted.group)}, 0)" if wanted.group else "0"
        reader = self._duck.sql(
            f"SELECT {_ITEM}, {group} AS item_group, occurrences, {', '.join(self._stored)} FROM (SELECT *, "
            f"row_number() OVER (PARTITION BY {_ITEM} ORDER BY {', '.join(order)}) AS place, "
            f"(sum(seen) OVER (PARTITION BY {_ITEM}))::BIGINT AS occurrences FROM variants {known}) "
            f"WHERE place = 1 ORDER BY item_group, {_ITEM}"
        ).to_arrow_reader(SOME_ITEMS)
        for batch in reader:
            yield self._items(batch)

    def _items(self, batch: pa.RecordBatch) -> Items:
        item, group, occurrences = (
            batch.column(name).to_numpy().astype(np.int64) for name in (_ITEM, "item_group", "occurrences")
        )
        stored = {name: batch.column(self._wanted.stored(name)) for name, _ in self._infos}
        features = {name: _bags(column) for name, column in stored.items()}
        return Items(item, group if self._wanted.group else None, occurrences, features)

    def close(self) -> None:
        self._duck.close()


def _arrow(bags: Bags, multi: bool) -> pa.Array:
    values = pa.array(bags.values.astype(np.int64))
    if not multi:
        return values
    offsets = np.arange(bags.size + 1) if bags.offsets is None else bags.offsets
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


def _bags(column: pa.Array) -> Bags:
    """Ids of a column of integers or of lists; a null is an empty bag."""
    if pa.types.is_integer(column.type):
        there = column.is_valid().to_numpy(zero_copy_only=False)
        values = column.drop_null().to_numpy().astype(np.int64)
        return Bags(values) if there.all() else Bags.of_lengths(values, there.astype(np.int64))
    lengths = column.value_lengths().fill_null(0).to_numpy().astype(np.int64)
    return Bags.of_lengths(column.flatten().to_numpy().astype(np.int64), lengths)


def as_column(bags: Bags, multi: bool) -> pa.Array:
    """Ids as a column of the output: null where a feature with one id each is not known."""
    if multi or bags.offsets is None:
        return _arrow(bags, multi)
    there = bags.lengths > 0
    filled = np.zeros(bags.size, dtype=np.int64)
    filled[there] = bags.values
    return pa.array(filled, mask=~there)
