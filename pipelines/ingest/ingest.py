"""Raw events become a sequence log: this file tells it from top to bottom.

The relational part is one chain of Ibis tables, run by DuckDB or by Spark:

    raw tables -> vocabularies -> encoded tables -> requests -> candidates -> rows -> Parquet

Vocabularies come from all events, and negatives are drawn from all of them; `users` only limits whose
requests are written, so a trial log is a part of the full one. Everything random is a seeded hash of ids.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ibis.expr import types as ir

from embeddings.errors import ConfigError, DataError
from pipelines.ingest.config import IngestConfig, load_ingest_config
from pipelines.ingest.domains import open_domains
from pipelines.ingest.downloads import downloads
from pipelines.ingest.encode import encode, in_buckets, narrow
from pipelines.ingest.engine import Engine, connect, count_rows
from pipelines.ingest.events import EVENTS, IMPRESSIONS, RAW_TABLES, open_events, open_impressions
from pipelines.ingest.exposure import check_feature
from pipelines.ingest.files import Files, find_files
from pipelines.ingest.history_free import history_free
from pipelines.ingest.names import NUMBERED, agree, with_numbers
from pipelines.ingest.numbers import NumberColumns
from pipelines.ingest.protocols.protocol import Tables
from pipelines.ingest.remarks import Span, lone_predictors, remarks, unused_settings
from pipelines.ingest.report import Counts, full_report, preview_lines, report_lines
from pipelines.ingest.requests import make_requests
from pipelines.ingest.rows import BlockWriter, auto_buckets
from pipelines.ingest.side_tables import DESCRIBED, ITEMS, USERS, open_side_tables, with_ids_only, with_items
from pipelines.ingest.sources import Survey, unread_settings
from pipelines.ingest.vocabulary import (
    OlderVocabulary,
    Vocabulary,
    build,
    column_shapes,
    id_kinds,
    older_encoders,
    older_vocabularies,
    without_vocabulary,
    write,
)
from trainer.log.encoders.code import MISSING
from trainer.log.schema import FeatureInfo, LogManifest, schema_of
from trainer.log.writer import check_target, staged, write_manifest, write_split
from trainer.sealed_folder import remove_folder
from trainer.storage import place

__all__ = ["IngestConfig", "ingest", "load_ingest_config", "preview", "report_lines"]

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class OpenTables:
    """The checked raw tables, by the names under which the engine keeps them; the events are the first.

    Attributes:
        source: all files of events, for an error about all of them.
        duplicates: events that more than one domain had.
    """

    tables: dict[str, ir.Table]
    survey: Survey
    source: str | None = None
    duplicates: int = 0


@dataclass(frozen=True)
class EncodedTables:
    """The tables of the protocols, and what the log says of their ids and of their numbers."""

    tables: Tables
    features: dict[str, FeatureInfo]
    context: dict[str, FeatureInfo]
    events: int
    buckets: int
    vocabularies: dict[str, Vocabulary]
    numbers: Mapping[str, Mapping[str, Any]]


def ingest(
    events: Files | None,
    out: Path,
    config: IngestConfig,
    *,
    overwrite: bool = False,
    impressions: Files | None = None,
    engine: str = "duckdb",
) -> LogManifest:
    """Writes the sequence log of an event table; `out` appears whole or not at all.

    Args:
        events: Parquet or CSV files (paths, folders or patterns) with the columns that `config.events` names;
            None if `config.domains` names the files.
        out: the log's folder. An existing log is replaced only with `overwrite`.
        impressions: files of impressions, for the protocol of that name.
        engine: `duckdb` or `spark`.

    Raises:
        ConfigError: tables are given that the config does not use, or not those it needs.
        DataError: the tables or the older log of `config.vocabulary` are missing or wrong, `out` is taken, or
            no request is left.
    """
    _check_inputs(events, impressions, config)
    out = place(out).absolute()
    check_target(out, overwrite)
    with downloads, staged(out, overwrite) as root:
        spill = root / "spill"
        with closing(connect(engine, config.engine, spill)) as runner:
            older = older_vocabularies(runner, config)
            raw = _open(runner, events, impressions, config, Survey())
            manifest = _write_log(runner, raw, older, root, config)
        remove_folder(spill, strict=True)
        write_manifest(root, manifest)
    return manifest


def preview(
    events: Files | None,
    config: IngestConfig,
    say: Callable[[str], None],
    *,
    impressions: Files | None = None,
    engine: str = "duckdb",
) -> None:
    """Says how the raw tables would be read, whether or not they are then refused; writes nothing.

    Args:
        say: gets one line after the other; the others are those of `ingest`.

    Raises:
        ConfigError, DataError: as `ingest`, as far as the raw tables are concerned.
    """
    _check_inputs(events, impressions, config)
    survey = Survey(measured=True)
    with (
        downloads,
        tempfile.TemporaryDirectory() as folder,
        closing(connect(engine, config.engine, Path(folder) / "spill")) as runner,
    ):
        try:
            older = older_vocabularies(runner, config)
            raw = _open(runner, events, impressions, config, survey)
            agree(raw.tables, older, survey)
        finally:
            for line in preview_lines(survey):
                say(line)


def _check_inputs(events: Files | None, impressions: Files | None, config: IngestConfig) -> None:
    if bool(config.domains) == bool(events):
        raise ConfigError(
            "with [[domains]] their files are the events: leave --events out"
            if events
            else "no events: name them with --events, or in [[domains]]"
        )
    if bool(impressions) != config.request_protocol.reads_impressions:
        raise ConfigError(
            f"protocol {config.protocol} uses no impressions: leave --impressions out"
            if impressions
            else f'protocol "{config.protocol}" needs the table of impressions: add --impressions FILE'
        )


def _open(
    engine: Engine, events: Files | None, impressions: Files | None, config: IngestConfig, survey: Survey
) -> OpenTables:
    side, shown, source, duplicates = open_side_tables(engine, config, survey), {}, None, 0
    if impressions:
        files = find_files(impressions, "impressions")
        shown = {IMPRESSIONS: open_impressions(engine, files, config, survey)}
    if events:
        files = find_files(events, "raw events")
        given = side[ITEMS].columns if ITEMS in side else ()
        table, source = open_events(engine, files, config, survey, given), files.label
    else:
        table, duplicates = open_domains(engine, config, survey)
    survey.notes += unread_settings(config, survey)
    if shown:
        check_feature(config.impressions, shown[IMPRESSIONS], side.get(ITEMS))
    return OpenTables({EVENTS: table, **shown, **side}, survey, source, duplicates)


def _write_log(
    engine: Engine, raw: OpenTables, older: Mapping[str, OlderVocabulary], root: Path, config: IngestConfig
) -> LogManifest:
    tables = agree(raw.tables, older, raw.survey)
    tables, named = with_numbers(engine, tables, older, root, raw.source, config)
    if ITEMS in tables:
        tables[EVENTS] = with_items(engine, tables[EVENTS], tables[ITEMS], config)
    raw, shows = replace(raw, tables=tables), IMPRESSIONS in tables
    if config.vocabulary.log and "user_id" in named and "user_id" not in older:
        note = "users are text here and integers in the older log: one number is two users in the two logs"
        raw.survey.notes.append(note)
    times = {
        name.removeprefix("raw_"): Span.of(engine, tables[name]) for name in RAW_TABLES if name in tables
    }
    _check_dates(times, raw, config)
    encoded = _encode(engine, raw, older, root, config)
    requests = make_requests(engine, encoded.tables, encoded.events, encoded.buckets, config)
    manifest = LogManifest(
        features=encoded.features,
        context=encoded.context,
        numeric=list(config.numbers) if shows else [],
        weighted=shows and bool(config.impressions.weight),
        tasks=list(config.tasks),
        partial=[task for task, label in config.labels.items() if label.partial],
        label_weights=list(config.label_weights),
        taxonomy=list(config.events.levels),
        named=named,
        columns=raw.survey.columns,
        notes=raw.survey.notes,
        splits={},
        ingest=config.model_dump(mode="json"),
        report={},
    )
    known = {name: made.rows for name, made in encoded.vocabularies.items() if made.rows is not None}
    events, buckets = encoded.tables.events, encoded.buckets
    writer = BlockWriter(engine, events, requests.offers, config, buckets, root / "spill", known)
    writer.prepare()
    layout, schema = (config.files.rows_per_group, config.files.rows_per_file), schema_of(manifest)
    splits = {split: write_split(writer.rows(split), root, split, schema, layout) for split in SPLITS}
    if not any(info.rows for info in splits.values()):
        problem = config.request_protocol.without_requests(config)
        if shows:
            problem += f" (the events are {times['events']}, the impressions {times['impressions']})"
        raise DataError(problem, file=raw.source)
    new = {name: made.new for name, made in encoded.vocabularies.items() if made.new}
    report = full_report(engine, Counts(encoded.tables, requests, splits, raw.duplicates, new, times), config)
    if raw_ids := {name: asdict(made.raw) for name, made in encoded.vocabularies.items() if made.raw}:
        report["raw_ids"] = raw_ids
    if encoded.numbers:
        report["numbers"] = dict(encoded.numbers)
    report |= remarks(engine, encoded.tables, encoded.buckets, config) | {
        "unused_settings": unused_settings(config),
        "predicts_alone": lone_predictors(engine, requests.offers, config),
    }
    if without_history := history_free(engine, events, requests.offers, splits, config):
        report["history_free"] = without_history
    return manifest.model_copy(update={"splits": splits, "report": report})


def _check_dates(times: Mapping[str, Span], raw: OpenTables, config: IngestConfig) -> None:
    """Drawn candidates are those of events: without one before validation there is nothing to train on."""
    span, draws = times["events"], config.request_protocol.draws_negatives
    if config.split is None or not draws or span.first < config.split.validation_start:
        return
    day = config.split.validation
    problem = f"no event before split.validation ({day}), they are {span}; move that date"
    raise DataError(problem, file=raw.source, column=config.events.timestamp)


def _encode(
    engine: Engine, raw: OpenTables, older: Mapping[str, OlderVocabulary], root: Path, config: IngestConfig
) -> EncodedTables:
    cutoff = config.split.validation_start if config.split else None
    vocabularies, multi, extend = {}, {}, config.vocabulary.extend
    id_kind, shapes = id_kinds(config), column_shapes(config)
    sides = {name: side for name, (_, side) in shapes.items()}
    numbers = NumberColumns.of(engine, raw.tables, sides, older_encoders(config), config)
    infos = dict(numbers.infos)
    for name, (several, side) in shapes.items():
        if name in numbers.infos:
            continue
        multi[name] = several
        # The log says nothing of items that no event and no impression has.
        keys = RAW_TABLES if name == "item_id" else tuple(raw.tables)
        having = {key: table for key, table in raw.tables.items() if key in keys and name in table.columns}
        kinds: dict[str, str] = {}
        for key, table in having.items():
            kinds.setdefault(str(table[name].type()), key.removeprefix("raw_"))
        if len(kinds) > 1:
            told = " and ".join(f"{kind} in the {key}" for kind, key in kinds.items())
            raise DataError(f"{name} is {told}; cast one of them", file=raw.source)
        sources = [narrow(engine, table, (name, "timestamp")) for table in having.values()]
        if id_kind[name] == "dense":
            vocabularies[name] = build(
                engine, name, sources, older.get(name), multi=multi[name], cutoff=cutoff, extend=extend
            )
        else:
            vocabularies[name] = without_vocabulary(engine, name, id_kind[name], sources, multi=multi[name])
        infos[name] = write(engine, name, vocabularies[name], root, multi[name], side)
    words = {name: vocabulary.words for name, vocabulary in vocabularies.items()}
    total = count_rows(engine, raw.tables[EVENTS])
    buckets = auto_buckets(total, config) if engine.bounded else 1
    finish: Callable[[ir.Table], ir.Table] = partial(in_buckets, buckets=buckets, seed=config.seed)
    encoded = {}
    for name, table in raw.tables.items():
        coded = {column: multi[column] for column in table.columns if column in multi}
        beside = name not in RAW_TABLES
        # An event whose item no table describes has no number.
        known = {each: table[each].fill_null(MISSING) for each in numbers.infos if each in table.columns}
        given = (table.mutate(**known) if known else table).drop(*(["timestamp"] if beside else []))
        last = with_ids_only if beside else finish
        encoded[name] = encode(engine, f"encoded_{name}", given, coded, words, last)
    for name in (*raw.tables, *NUMBERED, DESCRIBED):
        engine.drop(name)
    tables = Tables(
        encoded[EVENTS], encoded.get(IMPRESSIONS), items=encoded.get(ITEMS), users=encoded.get(USERS)
    )
    features = {feature.name: infos[feature.name] for feature in config.all_features}
    context = {entry.name: infos[f"context_{entry.name}"] for entry in config.context}
    return EncodedTables(tables, features, context, total, buckets, vocabularies, numbers.report)
