"""Opens and checks the raw tables before anything is computed from them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import ibis
from ibis.expr import types as ir

from embeddings.errors import DataError
from pipelines.ingest.columns import Kind, Wanted
from pipelines.ingest.config import (
    ColumnConfig,
    EventsConfig,
    FeatureConfig,
    ImpressionsConfig,
    IngestConfig,
)
from pipelines.ingest.engine import Engine
from pipelines.ingest.faults import fault_of, number_of
from pipelines.ingest.files import FoundFiles
from pipelines.ingest.labels import checked_labels
from pipelines.ingest.sources import RawTable, Seen, columns_of, open_files
from pipelines.ingest.values import UNITS

# Kept while they are needed: text is slow to parse, and a query plan wants to know how large a table is.
RAW_TABLES = EVENTS, SHOWN = ("raw_events", "raw_impressions")
_YEAR_5000 = 95_617_584_000  # unix seconds; a larger timestamp is in milli- or microseconds


def open_events(
    engine: Engine, files: FoundFiles, config: IngestConfig, seen: Seen, given: Collection[str] = ()
) -> ir.Table:
    """The events as user_id, request_id, timestamp (int64), one raw column a feature, and context_*.

    Users and requests are integers or text.

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
        *_roles("events", columns),
        Wanted("events.item", columns.item, "id"),
    ]
    named = {feature.name for feature in config.features}
    wanted += [
        wanted_column("features" if entry.name in named else "events.taxonomy", entry)
        for entry in entries
        if entry.name != "item_id"
    ]
    wanted += [wanted_column("context", entry) for entry in config.event_context]
    table = open_files(engine, files, wanted, config, seen)
    raw = table.table.select(
        **_role_values(table, columns),
        **{entry.name: raw_values(engine, table, entry) for entry in entries},
        **{f"context_{entry.name}": raw_values(engine, table, entry) for entry in config.event_context},
    )
    raw = engine.keep(EVENTS, raw)
    seen.loose[EVENTS] = loose_columns(table, _roles_of(columns), _named(entries, config.event_context))
    required = {"user_id": columns.user, "item_id": columns.item, "timestamp": columns.timestamp}
    check_values(engine, raw, table, required, config.csv.nulls)
    return raw


def open_impressions(engine: Engine, files: FoundFiles, config: IngestConfig, seen: Seen) -> ir.Table:
    """The impressions as user_id, request_id, timestamp, item_id, label_*, weight, numeric_*, context_*.

    Features of the item are there as far as the table has their columns.

    Raises:
        DataError: a file or a column is missing, of a wrong type, or holds impossible values.
    """
    columns = config.impressions
    numbers = {f"label_{task}": label.column for task, label in columns.labels.items()}
    numbers |= {f"numeric_{name}": name for name in columns.numeric}
    numbers |= {"weight": columns.weight} if columns.weight else {}
    present = columns_of(files, [columns.user, columns.item, columns.timestamp], config)
    entries = [entry for entry in config.all_features if entry.name != "item_id" and entry.side != "history"]
    entries = [entry for entry in entries if entry.side == "candidate" or entry.source in present]
    wanted = [*_roles("impressions", columns)]
    wanted += [Wanted("impressions.item", columns.item, "id")]
    keys = {f"label_{task}": f"impressions.labels: {task}" for task in columns.labels}
    keys |= {f"numeric_{name}": f"impressions.numeric: {name}" for name in columns.numeric}
    keys |= {"weight": "impressions.weight"}
    wanted += [Wanted(keys[name], column, "number") for name, column in numbers.items()]
    wanted += [wanted_column("features", entry) for entry in entries]
    wanted += [wanted_column("context", entry) for entry in config.shown_context]
    table = open_files(engine, files, wanted, config, seen)
    entries = [entry for entry in entries if entry.name != "domain_id"]
    raw = table.table.select(
        **_role_values(table, columns),
        **_shown_items(engine, table, entries, config),
        **{f"context_{entry.name}": raw_values(engine, table, entry) for entry in config.shown_context},
        **{name: table.values(column, "number").cast("float32") for name, column in numbers.items()},
    )
    raw = engine.keep(SHOWN, raw)
    seen.loose[SHOWN] = loose_columns(table, _roles_of(columns), _named(entries, config.shown_context))
    required = {"user_id": columns.user, "item_id": columns.item, "timestamp": columns.timestamp}
    required |= {"request_id": columns.request} if columns.request else {}
    check_values(engine, raw, table, required | numbers, config.csv.nulls)
    return checked_labels(engine, raw, table, columns, numbers)


def _shown_items(
    engine: Engine, table: RawTable, entries: Sequence[FeatureConfig], config: IngestConfig
) -> dict[str, ir.Value]:
    """The item and its features; with domains in the spelling of the merged events."""
    item = table.values(config.impressions.item, "id")
    values = {entry.name: raw_values(engine, table, entry) for entry in entries}
    if not config.domains:
        return {"item_id": item, **values}
    domain = config.impressions.domain
    multi = {entry.name: entry.multi for entry in entries}
    text = {name: value.cast("array<string>" if multi[name] else "string") for name, value in values.items()}
    item = ibis.literal(f"{domain}/") + item.cast("string")
    return {"item_id": item, "domain_id": ibis.literal(domain), **text}


def raw_values(engine: Engine, table: RawTable, entry: ColumnConfig) -> ir.Value:
    """The column of a feature; text with a separator becomes a list without blanks."""
    values = table.values(entry.source, kind_of(entry))
    if not entry.separator:
        return values
    parts = engine.split(values, entry.separator)
    return parts.map(lambda part: part.strip()).filter(lambda part: part != "")


def kind_of(entry: ColumnConfig) -> Kind:
    """What the column of a feature must hold."""
    return "id" if not entry.multi else ("text" if entry.separator else "ids")


def _roles(table: str, columns: EventsConfig | ImpressionsConfig) -> list[Wanted]:
    roles = [
        Wanted(f"{table}.user", columns.user, "key"),
        Wanted(f"{table}.timestamp", columns.timestamp, "time", columns.timestamp_unit),
    ]
    return roles + ([Wanted(f"{table}.request", columns.request, "key")] if columns.request else [])


def _role_values(table: RawTable, columns: EventsConfig | ImpressionsConfig) -> dict[str, ir.Value]:
    time = table.values(columns.timestamp, "time")
    request = table.values(columns.request, "key") if columns.request else time
    return {"user_id": table.values(columns.user, "key"), "request_id": request, "timestamp": time}


def _roles_of(columns: EventsConfig | ImpressionsConfig) -> dict[str, tuple[str, Kind]]:
    return {
        "user_id": (columns.user, "key"),
        "item_id": (columns.item, "id"),
        "request_id": (columns.request, "key"),
    }


def _named(entries: Iterable[ColumnConfig], context: Iterable[ColumnConfig]) -> dict[str, ColumnConfig]:
    return {entry.name: entry for entry in entries} | {f"context_{entry.name}": entry for entry in context}


def loose_columns(
    table: RawTable, keys: Mapping[str, tuple[str, Kind]], columns: Mapping[str, ColumnConfig]
) -> set[str]:
    """The columns of the table that `open_files` read as integers and could have left as text.

    Args:
        keys: name in the engine's table -> column of the files and what it must hold; columns: of features.
    """
    sources = {name: (entry.source, kind_of(entry)) for name, entry in columns.items()} | dict(keys)
    return {name for name, source in sources.items() if source in table.loose}


def wanted_column(section: str, entry: ColumnConfig) -> Wanted:
    """The column of a feature, for `open_files`."""
    return Wanted(f"{section}: {entry.name}", entry.source, kind_of(entry))


def check_values(
    engine: Engine, raw: ir.Table, table: RawTable, required: dict[str, str], nulls: Collection[str]
) -> None:
    """Refuses an empty table, nulls and NaN in required columns (name in `raw` -> in the file), odd times.

    Args:
        table: the files that `raw` was made of, to name the place of a fault; nulls: their words for nothing.
    """
    missing = {name: raw[name].isnull() for name in required}
    missing |= {
        name: missing[name] | raw[name].isnan() for name in required if raw[name].type().is_floating()
    }
    sums = {f"bad_{name}": bad.sum() for name, bad in missing.items()}
    times = {"earliest": raw.timestamp.min(), "latest": raw.timestamp.max()}
    found = engine.rows(raw.aggregate(rows=raw.count(), **times, **sums))[0]
    if not found["rows"]:
        raise DataError("has no rows; ingest needs some", file=table.label)
    for name, column in required.items():
        if count := found[f"bad_{name}"]:
            problem = f"null in {int(count):,} of {found['rows']:,} rows; remove or fill them"
            raise fault_of(table.files, column, problem, table.label, lambda cell: _is_given(cell, nulls))
    if found["latest"] > _YEAR_5000 or found["earliest"] < 0:
        raise _odd_time(table, required["timestamp"], int(found["earliest"]), int(found["latest"]))


def _is_given(cell: object, nulls: Collection[str]) -> bool:
    return cell is not None and cell != "" and cell not in nulls and str(cell).strip().lower() != "nan"


def _odd_time(table: RawTable, column: str, earliest: int, latest: int) -> DataError:
    """The error about times that lie before 1970, or so late that they must have another unit."""
    known = next(one for one in table.columns if one.want.column == column and one.want.kind == "time")
    unit = known.want.unit
    if latest <= _YEAR_5000:
        problem = f"{earliest} is before 1970; remove or mend such rows"
    elif known.has_own_unit:
        problem = f"{latest} unix seconds lie after the year 5000; mend how the column is written"
    else:
        others = [f'"{one}"' for one in UNITS if UNITS[one] > UNITS[unit]]
        key = f"{known.want.key}_unit"
        problem = f"{latest} is too large for unix seconds"
        problem += f' ({key} = "{unit}" was counted in)' if unit != "s" else ""
        problem += f"; set {key} = {' or '.join(others)}" if others else "; mend such rows"

    def fits(cell: object) -> bool:
        number = number_of(cell)
        return number is None or 0 <= number / UNITS[unit] <= _YEAR_5000

    return fault_of(table.files, column, problem, table.label, fits)
