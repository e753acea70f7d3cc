"""Tables of items and of users: what does not change in time, and is kept apart from the events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import ibis
from ibis.expr import types as ir

from embeddings.errors import DataError
from pipelines.ingest.columns import Wanted
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.encode import encode
from pipelines.ingest.engine import Engine
from pipelines.ingest.files import RawFiles, find_files
from pipelines.ingest.sources import Survey, columns_of, open_files

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


def open_side_tables(engine: Engine, config: IngestConfig, survey: Survey) -> SideTables:
    """The tables of items and of users that the config names.

    Raises:
        DataError: a file or a column is missing or of a wrong type, or a key is null or there twice.
    """
    items = users = file = None
    if config.item_table.files:
        files = find_files(config.item_table.files, "item table")
        key, file = Wanted("item_table.item", config.item_table.item, "id"), files.label
        items = _open(engine, ITEMS, files, {"item_id": key, **_given(files, config)}, config, survey)
    if config.user_table.files:
        files = find_files(config.user_table.files, "user table")
        key = Wanted("user_table.user", config.user_table.user, "key")
        context = {name: Wanted.of("context", entry) for name, entry in config.user_context.items()}
        users = _open(engine, USERS, files, {"user_id": key, **context}, config, survey)
    return SideTables(items, users, file)


def _given(files: RawFiles, config: IngestConfig) -> dict[str, Wanted]:
    """The features that the table of items gives: those of items whose column it has."""
    present = columns_of(files, [config.item_table.item], config)
    entries = [entry for entry in config.all_features if entry.side == "both" and entry.name != "item_id"]
    given = {entry.name: Wanted.of("features", entry) for entry in entries if entry.source in present}
    if not given:
        wanted = ", ".join(entry.source for entry in entries) or "there are none"
        problem = f'has no column of a feature of items (taxonomy, side = "both": {wanted})'
        raise DataError(problem, file=files.label)
    return given


def _open(
    engine: Engine,
    name: str,
    files: RawFiles,
    wanted: Mapping[str, Wanted],
    config: IngestConfig,
    survey: Survey,
) -> ir.Table:
    """The table, which the engine keeps as `name`; the first of the wanted columns is its key."""
    table = open_files(engine, files, wanted, config, survey)
    raw = engine.keep(name, table.table.mutate(timestamp=ibis.null("int64")))
    survey.loose[name] = table.loose
    key = next(iter(wanted))
    repeated = raw.group_by(key).aggregate(times=raw.count())
    repeated = repeated.filter((repeated.times > 1) | repeated[key].isnull()).order_by(key).limit(1)
    if found := engine.rows(repeated):
        value, times = found[0][key], found[0]["times"]
        problem = f"has {value!r} {times:,} times; leave one row of each"
        if value is None:
            problem = f"null in {times:,} rows; remove them"
        raise DataError(problem, file=files.label, column=wanted[key].column)
    return raw
