"""Tables of items and of users: what does not change in time, and is kept apart from the events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import ibis
from ibis.expr import types as ir

from embeddings.errors import DataError
from pipelines.ingest.columns import Kind, Wanted
from pipelines.ingest.config import ColumnConfig, FeatureConfig, IngestConfig
from pipelines.ingest.encoding import encode
from pipelines.ingest.engine import Engine
from pipelines.ingest.events import loose_columns, raw_values, wanted_column
from pipelines.ingest.files import FoundFiles, find_files
from pipelines.ingest.sources import Seen, columns_of, open_files

ITEMS, USERS = "raw_items", "raw_users"
# The events with what the table of items says of theirs.
DESCRIBED = "described_events"


@dataclass(frozen=True)
class SideTables:
    """Raw tables: item_id and features, user_id and context_*; `file` names those of items in errors.

    They have a null `timestamp`, so that values are counted as they are in events.
    """

    items: ir.Table | None = None
    users: ir.Table | None = None
    file: str | None = None

    @property
    def by_name(self) -> dict[str, ir.Table]:
        """The tables by the names under which the engine keeps them."""
        found = {ITEMS: self.items, USERS: self.users}
        return {name: table for name, table in found.items() if table is not None}

    @property
    def features(self) -> list[str]:
        """The features that the table of items gives."""
        return (
            [] if self.items is None else [n for n in self.items.columns if n not in ("item_id", "timestamp")]
        )

    def of(self, tables: Mapping[str, ir.Table]) -> SideTables:
        """The same with other tables by these names."""
        return replace(self, items=tables.get(ITEMS), users=tables.get(USERS))

    def beside(self, engine: Engine, events: ir.Table) -> ir.Table:
        """The events with the features that the table of items gives."""
        if self.items is None:
            return events
        theirs, mine = self.items["item_id"].type(), events["item_id"].type()
        if theirs.is_integer() != mine.is_integer():
            problem = f"the item is {theirs} here and {mine} in the events; cast one of them"
            raise DataError(problem, file=self.file)
        given = self.items.drop("timestamp").rename(_item="item_id")
        return engine.keep(DESCRIBED, events.left_join(given, events.item_id == given["_item"]).drop("_item"))

    def encoded(
        self, engine: Engine, multi: Mapping[str, bool], words: Mapping[str, ir.Table]
    ) -> tuple[ir.Table | None, ir.Table | None]:
        """Both tables in the ids of the log; items that nobody has met have none and are left out."""

        def ids(name: str, table: ir.Table | None) -> ir.Table | None:
            if table is None:
                return None
            coded = {column: multi[column] for column in table.columns if column in multi}
            return encode(engine, f"encoded_{name}", table.drop("timestamp"), coded, words, _met)

        return ids("items", self.items), ids("users", self.users)


def _met(table: ir.Table) -> ir.Table:
    """The rows of items and users that some event or impression has."""
    if "item_id" in table.columns:
        return table.filter(table.item_id > 0)
    return table.filter(table.user_id.notnull())


def _given_features(files: FoundFiles, config: IngestConfig) -> list[FeatureConfig]:
    """The features that the table of items gives: those of items whose column it has."""
    present = columns_of(files, [config.item_table.item], config)
    entries = [entry for entry in config.all_features if entry.side == "both" and entry.name != "item_id"]
    found = [entry for entry in entries if entry.source in present]
    if not found:
        wanted = ", ".join(entry.source for entry in entries) or "there are none"
        problem = f'has no column of a feature of items (taxonomy, side = "both": {wanted})'
        raise DataError(problem, file=files.label)
    return found


def open_side_tables(engine: Engine, config: IngestConfig, seen: Seen) -> SideTables:
    """The tables of items and of users that the config names.

    Raises:
        DataError: a file or a column is missing or of a wrong type, or a key is null or there twice.
    """
    items = users = file = None
    if config.item_table.files:
        files = find_files(config.item_table.files, "item table")
        file, key = files.label, Wanted("item_table.item", config.item_table.item, "id")
        columns = {entry.name: entry for entry in _given_features(files, config)}
        items = _open(engine, files, key, columns, ("item_id", ITEMS), config, seen)
    if config.user_table.files:
        files = find_files(config.user_table.files, "user table")
        key = Wanted("user_table.user", config.user_table.user, "key")
        named = {f"context_{entry.name}": entry for entry in config.user_context}
        users = _open(engine, files, key, named, ("user_id", USERS), config, seen)
    return SideTables(items, users, file)


def _open(
    engine: Engine,
    files: FoundFiles,
    key: Wanted,
    columns: Mapping[str, ColumnConfig],
    names: tuple[str, str],
    config: IngestConfig,
    seen: Seen,
) -> ir.Table:
    section = "context" if key.key.startswith("user_table") else "features"
    wanted = [wanted_column(section, entry) for entry in columns.values()]
    table = open_files(engine, files, [key, *wanted], config, seen)
    name, kept = names
    raw = table.table.select(
        **{name: table.values(key.column, key.kind)},
        timestamp=ibis.null("int64"),
        **{column: raw_values(engine, table, entry) for column, entry in columns.items()},
    )
    raw = engine.keep(kept, raw)
    keys: dict[str, tuple[str, Kind]] = {name: (key.column, key.kind)}
    seen.loose[kept] = loose_columns(table, keys, columns)
    repeated = raw.group_by(name).aggregate(times=raw.count())
    repeated = repeated.filter((repeated.times > 1) | repeated[name].isnull()).order_by(name).limit(1)
    if found := engine.rows(repeated):
        value, times = found[0][name], found[0]["times"]
        problem = f"has {value!r} {times:,} times; leave one row of each"
        if value is None:
            problem = f"null in {times:,} rows; remove them"
        raise DataError(problem, file=files.label, column=key.column)
    return raw
