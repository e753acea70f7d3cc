"""Tables of items and of users: what does not change in time, and is kept apart from the events."""

from __future__ import annotations

from collections.abc import Mapping

import ibis
from ibis.expr import types as ir

from embeddings.errors import DataError
from pipelines.ingest.columns import ColumnNeed, needs_of
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.engine import Engine
from pipelines.ingest.files import RawFiles, find_files
from pipelines.ingest.sources import Survey, columns_of, open_files

ITEMS, USERS = "raw_items", "raw_users"
# The events with what the table of items says of theirs.
DESCRIBED = "described_events"


def open_side_tables(engine: Engine, config: IngestConfig, survey: Survey) -> dict[str, ir.Table]:
    """The tables of items (item_id and features) and of users (user_id and context_*) that the config names.

    They have a null `timestamp`, so that values are counted as they are in events.

    Raises:
        DataError: a file or a column is missing or of a wrong type, or a key is null or there twice.
    """
    tables = {}
    if config.item_table.files:
        files = find_files(config.item_table.files, "item table")
        present = columns_of(files, [config.item_table.item], config)
        entries = [entry for entry in config.all_features if entry.side == "both" and entry.name != "item_id"]
        given = needs_of("features", {entry.name: entry for entry in entries if entry.source in present})
        if not given:
            names = ", ".join(entry.source for entry in entries) or "there are none"
            problem = f'has no column of a feature of items (taxonomy, side = "both": {names})'
            raise DataError(problem, file=files.label)
        wanted = {"item_id": ColumnNeed("item_table.item", config.item_table.item, "id"), **given}
        tables[ITEMS] = _open(engine, ITEMS, files, wanted, config, survey)
    if config.user_table.files:
        files = find_files(config.user_table.files, "user table")
        wanted = {"user_id": ColumnNeed("user_table.user", config.user_table.user, "key")}
        wanted |= needs_of("context", config.context_of("users"))
        tables[USERS] = _open(engine, USERS, files, wanted, config, survey)
    return tables


def with_items(engine: Engine, events: ir.Table, items: ir.Table, config: IngestConfig) -> ir.Table:
    """The events with the features that the table of items gives."""
    theirs, mine = items["item_id"].type(), events["item_id"].type()
    if theirs.is_integer() != mine.is_integer():
        problem = f"the item is {theirs} here and {mine} in the events; cast one of them"
        raise DataError(problem, file=find_files(config.item_table.files, "item table").label)
    given = items.drop("timestamp").rename(_item="item_id")
    return engine.keep(DESCRIBED, events.left_join(given, events.item_id == given["_item"]).drop("_item"))


def with_ids_only(table: ir.Table) -> ir.Table:
    """The rows of encoded items and users that some event or impression has; the others have no id."""
    if "item_id" in table.columns:
        return table.filter(table.item_id != 0)
    return table.filter(table.user_id.notnull())


def _open(
    engine: Engine,
    name: str,
    files: RawFiles,
    wanted: Mapping[str, ColumnNeed],
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
