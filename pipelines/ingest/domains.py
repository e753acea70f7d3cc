"""Opens the sources of a cross-domain history and maps them to one taxonomy."""

from __future__ import annotations

import ibis
from ibis.expr import types as ir

from embeddings.errors import DataError
from pipelines.ingest.columns import Kind, Wanted
from pipelines.ingest.config import ContextConfig, DomainConfig, FeatureConfig, IngestConfig
from pipelines.ingest.engine import Engine, count_rows
from pipelines.ingest.events import check_values, raw_values, wanted_column
from pipelines.ingest.files import find_files
from pipelines.ingest.sources import RawTable, Seen, columns_of, open_files
from pipelines.ingest.trajectories import merge, scoped


def open_domains(engine: Engine, config: IngestConfig, seen: Seen) -> tuple[ir.Table, int]:
    """The merged events in the columns of `open_events`, and how many duplicates were dropped.

    Raises:
        DataError: as `open_events`; or a mapping has no level, or explains a category twice.
    """
    sources = {domain.name: _open_domain(engine, domain, config, seen) for domain in config.domains}
    sources = _with_common_users(sources, config, seen)
    merged = engine.keep("trajectories", merge(list(sources.values())))
    before = sum(count_rows(engine, table) for table in sources.values())
    return merged, before - count_rows(engine, merged)


def _with_common_users(sources: dict[str, ir.Table], config: IngestConfig, seen: Seen) -> dict[str, ir.Table]:
    """The domains with users of one type: text where one has text and the others could be."""
    text = {name for name, table in sources.items() if table.user_id.type().is_string()}
    strict = [name for name in sources if name not in text and "user_id" not in seen.loose[name]]
    if text and strict:
        domain = next(domain for domain in config.domains if domain.name == strict[0])
        problem = f"holds integers, but the users of the domain {min(text)} are text; name it in text_columns"
        raise DataError(problem, file=", ".join(domain.files), column=domain.user)
    if not text:
        seen.loose["trajectories"] = {"user_id"} if not strict else set()
        return sources
    return {name: table.mutate(user_id=table.user_id.cast("string")) for name, table in sources.items()}


def _open_domain(engine: Engine, domain: DomainConfig, config: IngestConfig, seen: Seen) -> ir.Table:
    files = find_files(domain.files, f"events of the domain {domain.name}")
    where = f"domains.{domain.name}"
    present = columns_of(files, [domain.user, domain.item, domain.timestamp], config)
    wanted = [
        Wanted(f"{where}.user", domain.user, "key"),
        Wanted(f"{where}.timestamp", domain.timestamp, "time", domain.timestamp_unit),
        Wanted(f"{where}.item", domain.item, "id"),
    ]
    named = {"scenario": domain.scenario, "action": domain.action, "key": domain.key}
    wanted += [Wanted(f"{where}.{key}", column, "id") for key, column in named.items() if column]
    entries: dict[str, FeatureConfig | ContextConfig] = {
        feature.name: feature for feature in config.features if feature.side != "candidate"
    }
    entries |= {f"context_{entry.name}": entry for entry in config.event_context}
    known = {name: entry for name, entry in entries.items() if entry.source in present}
    wanted += [wanted_column("features", entry) for entry in known.values()]
    table = open_files(engine, files, wanted, config, seen)
    seen.loose[domain.name] = {"user_id"} if (domain.user, "key") in table.loose else set()
    further = {name: _further(engine, table, entry, name in known) for name, entry in entries.items()}
    raw = scoped(table.table, _columns(table, domain), domain.name, further)
    required = {"user_id": domain.user, "item_id": domain.item, "timestamp": domain.timestamp}
    check_values(engine, raw, table, required, config.csv.nulls)
    levels = [name for name in config.events.features if name != "item_id"]
    if not domain.mapping:
        # Unknown, never guessed.
        unknown = {name: ibis.null("string") for name in levels}
        return raw.mutate(**unknown).drop("key")
    mapping = _mapping(engine, domain, config, seen)
    return raw.left_join(mapping, raw["key"] == mapping["key_right"]).drop("key", "key_right")


def _columns(table: RawTable, domain: DomainConfig) -> dict[str, ir.Value]:
    """The values of the domain's own columns, as far as it has them."""
    kinds: dict[str, Kind] = {"user": "key", "timestamp": "time", "item": "id"}
    kinds |= {"scenario": "id", "action": "id", "key": "id"}
    names = {name: getattr(domain, name) for name in kinds}
    return {name: table.values(column, kinds[name]) for name, column in names.items() if column}


def _further(
    engine: Engine, table: RawTable, entry: FeatureConfig | ContextConfig, present: bool
) -> ir.Value:
    """The column as text (ids of two domains need a common type), or nulls where the domain lacks it."""
    if not present:
        return ibis.null("array<string>" if entry.multi else "string")
    values = raw_values(engine, table, entry)
    return values.cast("array<string>" if entry.multi else "string")


def _mapping(engine: Engine, domain: DomainConfig, config: IngestConfig, seen: Seen) -> ir.Table:
    """key_right and the taxonomy's levels as text; null where the mapping does not have the level."""
    files = find_files(domain.mapping, f"the mapping of the domain {domain.name}")
    path = files.label
    present = columns_of(files, [domain.key], config)
    columns = {name: column for name, column in config.events.features.items() if name != "item_id"}
    known = [column for column in columns.values() if column in present]
    if not known:
        problem = f"has none of the levels of events.taxonomy ({', '.join(columns.values())}); add one"
        raise DataError(problem, file=path)
    wanted = [Wanted(f"domains.{domain.name}.key", domain.key, "id")]
    wanted += [Wanted(f"events.taxonomy: {column}", column, "id") for column in known]
    table = open_files(engine, files, wanted, config, seen)
    key = table.values(domain.key, "id").cast("string")
    repeated = table.table.group_by(key=key).aggregate(times=ibis._.count())
    repeated = repeated.filter(repeated.times > 1).limit(1)
    if found := engine.rows(repeated):
        problem = f"explains {found[0]['key']!r} {found[0]['times']} times; leave one row of it"
        raise DataError(problem, file=path, column=domain.key)
    levels = {
        name: table.values(column, "id").cast("string") if column in known else ibis.null("string")
        for name, column in columns.items()
    }
    return table.table.select(key_right=key, **levels)
