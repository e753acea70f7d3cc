"""Opens and checks the raw tables before anything is computed from them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import ibis
from ibis.expr import types as ir

from embeddings.errors import DataError
from pipelines.ingest_engine import Engine
from pipelines.ingest_labels import checked_labels
from pipelines.ingest_sources import Kind, Wanted, columns_of, open_files
from trainer.data.ingest_config import ColumnConfig, FeatureConfig, IngestConfig

# Kept while they are needed: text is slow to parse, and a query plan wants to know how large a table is.
RAW_TABLES = _EVENTS, _SHOWN = ("raw_events", "raw_impressions")
_YEAR_5000 = 95_617_584_000  # unix seconds; a larger timestamp is in milli- or microseconds


def open_events(
    engine: Engine, files: Sequence[Path], config: IngestConfig, given: Collection[str] = ()
) -> ir.Table:
    """The events as user_id, request_id, timestamp (int64), one raw column a feature, and context_*.

    Args:
        given: the features that another table gives, of which the events need no column.

    Raises:
        DataError: a file or a column is missing, of a wrong type, or holds impossible values.
    """
    columns = config.events
    entries = [
        entry for entry in config.all_features if entry.side != "candidate" and entry.name not in given
    ]
    wanted = [
        *_roles("events", columns.user, columns.timestamp, columns.request),
        Wanted("events.item", columns.item, "id"),
    ]
    named = {feature.name for feature in config.features}
    wanted += [
        wanted_column("features" if entry.name in named else "events.taxonomy", entry)
        for entry in entries
        if entry.name != "item_id"
    ]
    wanted += [wanted_column("context", entry) for entry in config.event_context]
    table = open_files(engine, files, wanted, config.text_columns)
    raw = table.select(
        user_id=table[columns.user].cast("int64"),
        request_id=table[columns.request or columns.timestamp].cast("int64"),
        timestamp=table[columns.timestamp].cast("int64"),
        **{entry.name: raw_values(table, entry) for entry in entries},
        **{f"context_{entry.name}": raw_values(table, entry) for entry in config.event_context},
    )
    raw = engine.keep(_EVENTS, raw)
    required = {"user_id": columns.user, "item_id": columns.item, "timestamp": columns.timestamp}
    check_values(engine, raw, files[0], required)
    return raw


def open_impressions(engine: Engine, files: Sequence[Path], config: IngestConfig) -> ir.Table:
    """The impressions as user_id, request_id, timestamp, item_id, label_*, weight, numeric_*, context_*.

    Features of the item are there as far as the table has their columns.

    Raises:
        DataError: a file or a column is missing, of a wrong type, or holds impossible values.
    """
    columns = config.impressions
    numbers = {f"label_{task}": label.column for task, label in columns.labels.items()}
    numbers |= {f"numeric_{name}": name for name in columns.numeric}
    numbers |= {"weight": columns.weight} if columns.weight else {}
    present = set(columns_of(files))
    entries = [entry for entry in config.all_features if entry.name != "item_id" and entry.side != "history"]
    entries = [entry for entry in entries if entry.side == "candidate" or entry.source in present]
    wanted = [*_roles("impressions", columns.user, columns.timestamp, columns.request)]
    wanted += [Wanted("impressions.item", columns.item, "id")]
    wanted += [Wanted(f"impressions, for {name}", column, "number") for name, column in numbers.items()]
    wanted += [wanted_column("features", entry) for entry in entries]
    wanted += [wanted_column("context", entry) for entry in config.shown_context]
    table = open_files(engine, files, wanted, config.text_columns)
    entries = [entry for entry in entries if entry.name != "domain_id"]
    raw = table.select(
        user_id=table[columns.user].cast("int64"),
        request_id=table[columns.request or columns.timestamp].cast("int64"),
        timestamp=table[columns.timestamp].cast("int64"),
        **_shown_items(table, entries, config),
        **{f"context_{entry.name}": raw_values(table, entry) for entry in config.shown_context},
        **{name: table[column].cast("float32") for name, column in numbers.items()},
    )
    raw = engine.keep(_SHOWN, raw)
    required = {"user_id": columns.user, "item_id": columns.item, "timestamp": columns.timestamp}
    required |= {"request_id": columns.request} if columns.request else {}
    check_values(engine, raw, files[0], required | numbers)
    return checked_labels(engine, raw, files[0], columns, numbers)


def _shown_items(
    table: ir.Table, entries: Sequence[FeatureConfig], config: IngestConfig
) -> dict[str, ir.Value]:
    """The item and its features; with domains in the spelling of the merged events."""
    item = table[config.impressions.item]
    values = {entry.name: raw_values(table, entry) for entry in entries}
    if not config.domains:
        return {"item_id": item, **values}
    domain = config.impressions.domain
    multi = {entry.name: entry.multi for entry in entries}
    text = {name: value.cast("array<string>" if multi[name] else "string") for name, value in values.items()}
    item = ibis.literal(f"{domain}/") + item.cast("string")
    return {"item_id": item, "domain_id": ibis.literal(domain), **text}


def raw_values(table: ir.Table, entry: ColumnConfig) -> ir.Value:
    """The column of a feature; text with a separator becomes a list without blanks."""
    values = table[entry.source]
    if not entry.separator:
        return values
    return values.split(entry.separator).map(lambda part: part.strip()).filter(lambda part: part != "")


def _roles(table: str, user: str, timestamp: str, request: str) -> list[Wanted]:
    roles = {"user": user, "timestamp": timestamp, "request": request}
    return [Wanted(f"{table}.{key}", column, "integer") for key, column in roles.items() if column]


def wanted_column(section: str, entry: ColumnConfig) -> Wanted:
    """The column of a feature, for `open_files`."""
    kind: Kind = "id" if not entry.multi else ("text" if entry.separator else "ids")
    return Wanted(f"{section}: {entry.name}", entry.source, kind)


def check_values(engine: Engine, raw: ir.Table, file: Path, required: dict[str, str]) -> None:
    """Refuses an empty table, nulls and NaN in required columns (name in `raw` -> in the file), odd times."""
    missing = {name: raw[name].isnull() for name in required}
    missing |= {
        name: missing[name] | raw[name].isnan() for name in required if raw[name].type().is_floating()
    }
    sums = {f"bad_{name}": bad.sum() for name, bad in missing.items()}
    times = {"earliest": raw.timestamp.min(), "latest": raw.timestamp.max()}
    found = engine.rows(raw.aggregate(rows=raw.count(), **times, **sums))[0]
    if not found["rows"]:
        raise DataError("has no rows; ingest needs some", file=file)
    for name, column in required.items():
        if count := found[f"bad_{name}"]:
            problem = f"null in {int(count):,} of {found['rows']:,} rows; remove or fill them"
            raise DataError(problem, file=file, column=column)
    if found["latest"] > _YEAR_5000:
        problem = f"{found['latest']} is too large for unix seconds; divide milliseconds by 1,000"
        raise DataError(problem, file=file, column=required["timestamp"])
    if found["earliest"] < 0:
        problem = f"{found['earliest']} is before 1970; remove or mend such rows"
        raise DataError(problem, file=file, column=required["timestamp"])
