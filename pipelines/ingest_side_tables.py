"""Tables of items and of users: what does not change in time, and is kept apart from the events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ibis
from ibis.expr import types as ir

from embeddings.errors import DataError
from pipelines.event_table import raw_values, wanted_column
from pipelines.ingest_engine import Engine
from pipelines.ingest_sources import Wanted, columns_of, find_files, open_files
from pipelines.ingest_tables import encode
from trainer.data.ingest_config import ColumnConfig, FeatureConfig, IngestConfig


@dataclass(frozen=True)
class SideTables:
    """Raw tables: item_id and features, user_id and context_*; `file` is the first of items.

    They have a null `timestamp`, so that values are counted as they are in events.
    """

    items: ir.Table | None = None
    users: ir.Table | None = None
    file: Path | None = None

    @property
    def all(self) -> list[ir.Table]:
        return [table for table in (self.items, self.users) if table is not None]

    def beside(self, events: ir.Table) -> ir.Table:
        """The events with the features that the table of items gives."""
        if self.items is None:
            return events
        theirs, mine = self.items["item_id"].type(), events["item_id"].type()
        if theirs.is_integer() != mine.is_integer():
            problem = f"the item is {theirs} here and {mine} in the events; cast one of them"
            raise DataError(problem, file=self.file)
        given = self.items.drop("timestamp").rename(_item="item_id")
        return events.left_join(given, events.item_id == given["_item"]).drop("_item")

    def encoded(
        self, multi: Mapping[str, bool], words: Mapping[str, ir.Table]
    ) -> tuple[ir.Table | None, ir.Table | None]:
        """Both tables in the ids of the log; items that nobody has met have none and are left out."""

        def ids(table: ir.Table | None) -> ir.Table | None:
            if table is None:
                return None
            coded = {name: multi[name] for name in table.columns if name in multi}
            return encode(table.drop("timestamp"), coded, words, {})

        items, users = ids(self.items), ids(self.users)
        return (None if items is None else items.filter(items.item_id > 0)), users


def given_features(config: IngestConfig) -> list[FeatureConfig]:
    """The features that the table of items gives: those of items whose column it has."""
    if not config.item_table.files:
        return []
    files = find_files(config.item_table.files, "the item table")
    present = set(columns_of(files))
    entries = [entry for entry in config.all_features if entry.side == "both" and entry.name != "item_id"]
    found = [entry for entry in entries if entry.source in present]
    if not found:
        wanted = ", ".join(entry.source for entry in entries) or "there are none"
        problem = f'has no column of a feature of items (taxonomy, side = "both": {wanted})'
        raise DataError(problem, file=files[0])
    return found


def open_side_tables(engine: Engine, config: IngestConfig) -> SideTables:
    """The tables of items and of users that the config names.

    Raises:
        DataError: a file or a column is missing or of a wrong type, or a key is null or there twice.
    """
    items = users = file = None
    if config.item_table.files:
        files = find_files(config.item_table.files, "the item table")
        file, key = files[0], Wanted("item_table.item", config.item_table.item, "id")
        columns = {entry.name: entry for entry in given_features(config)}
        items = _open(engine, files, key, columns, ("item_id", "raw_items"), config)
    if config.user_table.files:
        files = find_files(config.user_table.files, "the user table")
        key = Wanted("user_table.user", config.user_table.user, "integer")
        named = {f"context_{entry.name}": entry for entry in config.user_context}
        users = _open(engine, files, key, named, ("user_id", "raw_users"), config)
    return SideTables(items, users, file)


def _open(
    engine: Engine,
    files: Sequence[Path],
    key: Wanted,
    columns: Mapping[str, ColumnConfig],
    names: tuple[str, str],
    config: IngestConfig,
) -> ir.Table:
    wanted = [wanted_column(entry.kind, entry) for entry in columns.values()]
    table = open_files(engine, files, [key, *wanted], config.text_columns)
    name, kept = names
    values = table[key.column]
    raw = table.select(
        **{name: values.cast("int64") if values.type().is_integer() else values},
        timestamp=ibis.null("int64"),
        **{column: raw_values(table, entry) for column, entry in columns.items()},
    )
    raw = engine.keep(kept, raw)
    repeated = raw.group_by(name).aggregate(times=raw.count())
    repeated = repeated.filter((repeated.times > 1) | repeated[name].isnull()).order_by(name).limit(1)
    if found := engine.rows(repeated):
        value, times = found[0][name], found[0]["times"]
        problem = f"has {value!r} {times:,} times; leave one row of each"
        if value is None:
            problem = f"null in {times:,} rows; remove them"
        raise DataError(problem, file=files[0], column=key.column)
    return raw
