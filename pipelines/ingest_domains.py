"""Opens the sources of a cross-domain history and maps them to one taxonomy."""

from __future__ import annotations

from pathlib import Path

import ibis
from ibis.expr import types as ir

from embeddings.errors import DataError
from pipelines.event_table import check_values, raw_values
from pipelines.ingest_engine import Engine
from pipelines.ingest_sources import Wanted, columns_of, find_files, open_files
from trainer.data.ingest_config import ContextConfig, DomainConfig, FeatureConfig, IngestConfig
from trainer.data.trajectories import merge, scoped


def open_domains(engine: Engine, config: IngestConfig) -> tuple[ir.Table, int]:
    """The merged events in the columns of `open_events`, and how many duplicates were dropped.

    Raises:
        DataError: as `open_events`; or a mapping has no level, or explains a category twice.
    """
    sources = {domain.name: _open_domain(engine, domain, config) for domain in config.domains}
    merged = engine.keep("trajectories", merge(list(sources.values())))
    before = sum(engine.rows(table.aggregate(rows=table.count()))[0]["rows"] for table in sources.values())
    after = engine.rows(merged.aggregate(rows=merged.count()))[0]["rows"]
    return merged, int(before - after)


def _open_domain(engine: Engine, domain: DomainConfig, config: IngestConfig) -> ir.Table:
    files = find_files(domain.files, f"events of the domain {domain.name}")
    where = f"domains.{domain.name}"
    present = set(columns_of(files))
    wanted = [
        Wanted(f"{where}.user", domain.user, "integer"),
        Wanted(f"{where}.timestamp", domain.timestamp, "integer"),
        Wanted(f"{where}.item", domain.item, "id"),
    ]
    named = {"scenario": domain.scenario, "action": domain.action, "key": domain.key}
    wanted += [Wanted(f"{where}.{key}", column, "id") for key, column in named.items() if column]
    table = open_files(engine, files, wanted, config.text_columns)
    entries: dict[str, FeatureConfig | ContextConfig] = {
        feature.name: feature for feature in config.features if feature.side != "candidate"
    }
    entries |= {f"context_{entry.name}": entry for entry in config.event_context}
    further = {name: _further(table, entry, present) for name, entry in entries.items()}
    raw = scoped(table, domain, further)
    check_values(
        engine, raw, files[0], {"user_id": domain.user, "item_id": domain.item, "timestamp": domain.timestamp}
    )
    levels = [name for name in config.events.features if name != "item_id"]
    if not domain.mapping:
        # Unknown, never guessed.
        unknown = {name: ibis.null("string") for name in levels}
        return raw.mutate(**unknown).drop("key")
    mapping = _mapping(engine, domain, config)
    return raw.left_join(mapping, raw["key"] == mapping["key_right"]).drop("key", "key_right")


def _further(table: ir.Table, entry: FeatureConfig | ContextConfig, present: set[str]) -> ir.Value:
    """The column as text (ids of two domains need a common type), or nulls where the domain lacks it."""
    if entry.source not in present:
        return ibis.null("array<string>" if entry.multi else "string")
    values = raw_values(table, entry)
    return values.cast("array<string>" if entry.multi else "string")


def _mapping(engine: Engine, domain: DomainConfig, config: IngestConfig) -> ir.Table:
    """key_right and the taxonomy's levels as text; null where the mapping does not have the level."""
    path = Path(domain.mapping)
    files = find_files(path, f"the mapping of the domain {domain.name}")
    present = set(columns_of(files))
    columns = {name: column for name, column in config.events.features.items() if name != "item_id"}
    known = [column for column in columns.values() if column in present]
    if not known:
        problem = f"has none of the levels of events.taxonomy ({', '.join(columns.values())}); add one"
        raise DataError(problem, file=path)
    wanted = [Wanted(f"domains.{domain.name}.key", domain.key, "id")]
    wanted += [Wanted(f"events.taxonomy: {column}", column, "id") for column in known]
    table = open_files(engine, files, wanted, [*config.text_columns])
    key = table[domain.key].cast("string")
    repeated = table.group_by(key=key).aggregate(times=ibis._.count())
    repeated = repeated.filter(repeated.times > 1).limit(1)
    if found := engine.rows(repeated):
        problem = f"explains {found[0]['key']!r} {found[0]['times']} times; leave one row of it"
        raise DataError(problem, file=path, column=domain.key)
    levels = {
        name: table[column].cast("string") if column in known else ibis.null("string")
        for name, column in columns.items()
    }
    return table.select(key_right=key, **levels)
