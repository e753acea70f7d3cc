"""Opens the sources of a cross-domain history and merges them, mapped to one taxonomy."""

from __future__ import annotations

from collections.abc import Sequence

import ibis
from ibis.expr import types as ir

from embeddings.errors import DataError
from pipelines.ingest.columns import ColumnNeed, needs_of
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.engine import Engine, count_rows
from pipelines.ingest.events import check_values, roles
from pipelines.ingest.files import find_files
from pipelines.ingest.sections import ColumnConfig, DomainConfig
from pipelines.ingest.sources import Survey, all_rows, columns_of, open_files
from trainer.log.encoders.code import MISSING

_SAME = ("user_id", "item_id", "action_id", "timestamp")


def open_domains(engine: Engine, config: IngestConfig, survey: Survey) -> tuple[ir.Table, int]:
    """The merged events in the columns of `open_events`, and how many duplicates were dropped.

    Raises:
        DataError: as `open_events`; or a mapping has no level, or explains a category twice.
    """
    sources = {domain.name: _open_domain(engine, domain, config, survey) for domain in config.domains}
    # Users are of one type: text where one domain has text and the others could be.
    text = {name for name, table in sources.items() if table.user_id.type().is_string()}
    strict = [name for name in sources if name not in text and "user_id" not in survey.loose[name]]
    if text and strict:
        domain = next(domain for domain in config.domains if domain.name == strict[0])
        problem = f"holds integers, but the users of the domain {min(text)} are text; name it in text_columns"
        raise DataError(problem, file=", ".join(domain.files), column=domain.user)
    if text:
        sources = {
            name: table.mutate(user_id=table.user_id.cast("string")) for name, table in sources.items()
        }
    else:
        survey.loose["trajectories"] = set() if strict else {"user_id"}
    merged = engine.keep("trajectories", merge(list(sources.values())))
    before = sum(count_rows(engine, table) for table in sources.values())
    return merged, before - count_rows(engine, merged)


def merge(sources: Sequence[ir.Table]) -> ir.Table:
    """All events, one of each (user, item, action, second): of several the least in its other columns."""
    names = list(sources[0].columns)
    everything = all_rows([table.select(names) for table in sources])
    others = [everything[name] for name in names if name not in _SAME]
    place = ibis.row_number().over(group_by=list(_SAME), order_by=others)
    numbered = everything.mutate(place=place)
    return numbered.filter(numbered.place == 0).drop("place")


def _open_domain(engine: Engine, domain: DomainConfig, config: IngestConfig, survey: Survey) -> ir.Table:
    """One domain's events: user_id, request_id, timestamp, item_id, domain_id, ..., and the taxonomy.

    Items and scenarios carry the domain's name, so that equal numbers of two domains are never one id;
    actions do not: a click is a click.
    """
    files = find_files(domain.files, f"events of the domain {domain.name}")
    where = f"domains.{domain.name}"
    present = columns_of(files, [domain.user, domain.item, domain.timestamp], config)
    wanted = roles(where, domain)
    optional = {"scenario_id": domain.scenario, "action_id": domain.action, "_key": domain.key}
    wanted |= {
        name: ColumnNeed(f"{where}.{name.strip('_').removesuffix('_id')}", column, "id")
        for name, column in optional.items()
        if column
    }
    entries: dict[str, ColumnConfig] = {
        feature.name: feature for feature in config.features if feature.side != "candidate"
    }
    entries |= config.context_of("events")
    there = {name: entry for name, entry in entries.items() if entry.source in present}
    wanted |= needs_of("features", there)
    table = open_files(engine, files, wanted, config, survey)
    survey.loose[domain.name] = table.loose & {"user_id"}

    def text(name: str, multi: bool = False) -> ir.Value:
        """The column as text, since ids of two domains need one type; null where the domain lacks it."""
        kind = "array<string>" if multi else "string"
        return table.table[name].cast(kind) if name in wanted else ibis.null(kind)

    def number(name: str) -> ir.Value:
        """The codes of a column; missing where the domain lacks it."""
        return table.table[name] if name in wanted else ibis.literal(MISSING, type="int64")

    prefix = ibis.literal(f"{domain.name}/")
    raw = table.table.select(
        user_id=table.table.user_id,
        request_id=table.table.timestamp,
        timestamp=table.table.timestamp,
        item_id=prefix + text("item_id"),
        domain_id=ibis.literal(domain.name),
        scenario_id=prefix + text("scenario_id"),
        action_id=text("action_id"),
        _key=text("_key"),
        **{name: text(name, entry.multi) for name, entry in entries.items() if entry.encoder is None},
        **{name: number(name) for name, entry in entries.items() if entry.encoder is not None},
    )
    check_values(engine, raw, table, ("user_id", "item_id", "timestamp"), config.csv.nulls)
    if not domain.mapping:
        # Unknown, never guessed.
        return raw.mutate(**{name: ibis.null("string") for name in config.events.levels}).drop("_key")
    mapping = _mapping(engine, domain, config, survey)
    return raw.left_join(mapping, raw["_key"] == mapping["_mapped"]).drop("_key", "_mapped")


def _mapping(engine: Engine, domain: DomainConfig, config: IngestConfig, survey: Survey) -> ir.Table:
    """_mapped and the taxonomy's levels as text; null where the mapping does not have the level."""
    files = find_files(domain.mapping, f"the mapping of the domain {domain.name}")
    present = columns_of(files, [domain.key], config)
    levels = config.events.levels
    wanted = {
        name: ColumnNeed(f"events.taxonomy: {column}", column, "id")
        for name, column in levels.items()
        if column in present
    }
    if not wanted:
        problem = f"has none of the levels of events.taxonomy ({', '.join(levels.values())}); add one"
        raise DataError(problem, file=files.label)
    wanted = {"_mapped": ColumnNeed(f"domains.{domain.name}.key", domain.key, "id"), **wanted}
    table = open_files(engine, files, wanted, config, survey).table
    levels_as_text = {
        name: table[name].cast("string") if name in wanted else ibis.null("string") for name in levels
    }
    table = table.select(_mapped=table["_mapped"].cast("string"), **levels_as_text)
    repeated = table.group_by("_mapped").aggregate(times=ibis._.count())
    repeated = repeated.filter(repeated.times > 1).limit(1)
    if found := engine.rows(repeated):
        problem = f"explains {found[0]['_mapped']!r} {found[0]['times']} times; leave one row of it"
        raise DataError(problem, file=files.label, column=domain.key)
    return table
