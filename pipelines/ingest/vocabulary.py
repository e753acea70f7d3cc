"""Which dense id stands for which raw value: counted anew, or continued from an older log."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import ibis
import pyarrow.parquet as pq
from ibis.expr import types as ir

from embeddings.errors import DataError
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.downloads import downloads
from pipelines.ingest.engine import Engine
from pipelines.ingest.files import look
from pipelines.ingest.numbers import encoders_of
from pipelines.ingest.portable_hash import text_id
from pipelines.ingest.sections import IdKind
from trainer.config.places import place_of
from trainer.log.encoders.buckets import Buckets
from trainer.log.encoders.table import AnyEncoder
from trainer.log.hashed_ids import NOTHING
from trainer.log.schema import FeatureInfo, Side, read_manifest
from trainer.log.vocabulary import spell, stream_values
from trainer.sealed_folder import MANIFEST

_BATCH = 1 << 16


@dataclass(frozen=True)
class OlderVocabulary:
    """A vocabulary of an older log: its file, its table (value, id) and its rows, unknown included."""

    file: Path
    table: ir.Table
    rows: int


@dataclass(frozen=True)
class Vocabulary:
    """The ids of one feature while a log is made.

    Attributes:
        words: value, id, count.
        rows: ids from here on are not the log's: what is written has 0 in their place; None: all are.
        new: (values, occurrences) that the older log does not have; None where there is no older log.
        kind: what its ids are; raw: of ids that are no dense ones.
    """

    words: ir.Table
    rows: int | None = None
    new: tuple[int, int] | None = None
    kind: IdKind = "dense"
    raw: RawIds | None = None


@dataclass(frozen=True)
class RawIds:
    """What is known of the ids of a feature that has no vocabulary.

    Attributes:
        values: different ids; nothing: places in which a value has the id that means no value.
    """

    values: int
    nothing: int


def id_kinds(config: IngestConfig) -> dict[str, IdKind]:
    """Column of the raw tables -> what its ids are."""
    kinds: dict[str, IdKind] = {entry.name: entry.ids for entry in config.all_features}
    return kinds | {f"context_{entry.name}": entry.ids for entry in config.context}


def column_shapes(config: IngestConfig) -> dict[str, tuple[bool, Side]]:
    """Column of the raw tables -> (whether it is multi-valued, its side), features first, then context_*."""
    shapes: dict[str, tuple[bool, Side]] = {
        entry.name: (entry.multi, entry.side) for entry in config.all_features
    }
    return shapes | {f"context_{entry.name}": (entry.multi, "both") for entry in config.context}


def older_vocabularies(engine: Engine, config: IngestConfig) -> dict[str, OlderVocabulary]:
    """The vocabularies of `config.vocabulary.log`, compared with that log's manifest; {} without one.

    Raises:
        DataError: it is no sequence log, has other features than the config, or a vocabulary is missing,
            damaged or ambiguous.
    """
    if not config.vocabulary.log:
        return {}
    log = place_of("vocabulary.log", config.vocabulary.log)
    manifest = read_manifest(log)
    infos = manifest.features | {f"context_{name}": info for name, info in manifest.context.items()}
    shapes, kinds, encoders = column_shapes(config), id_kinds(config), encoders_of(config)
    remedy = "ingest with that log's columns, or without its vocabulary"
    for name in (*infos, *shapes):
        problem = ""
        if name not in shapes:
            problem = f"has {_called(name)}, which this config does not ingest"
        elif name not in infos:
            problem = f"lacks {_called(name)}, which this config ingests"
        elif (infos[name].multi, infos[name].side) != shapes[name]:
            theirs, mine = _shape(infos[name].multi, infos[name].side), _shape(*shapes[name])
            problem = f"has {_called(name)} as {theirs}, this config as {mine}"
        elif not _same_encoder(infos[name].encoder, encoders.get(name)):
            problem = f"encodes {_called(name)} otherwise than this config"
        elif (theirs := _kind_of(infos[name])) != kinds[name]:
            problem = f"has {theirs} ids of {_called(name)}, this config {kinds[name]} ones"
        if problem:
            raise DataError(f"{problem}; {remedy}", file=log / MANIFEST)
    infos |= manifest.named
    return {
        name: _older(engine, downloads.local(log / "vocab" / f"{name}.parquet"), info)
        for name, info in infos.items()
        if not info.raw and info.encoder is None
    }


def older_encoders(config: IngestConfig) -> dict[str, AnyEncoder]:
    """Column of the raw tables -> the encoder of its numbers in the log of `config.vocabulary.log`."""
    if not config.vocabulary.log:
        return {}
    manifest = read_manifest(place_of("vocabulary.log", config.vocabulary.log))
    infos = manifest.features | {f"context_{name}": info for name, info in manifest.context.items()}
    return {name: info.encoder for name, info in infos.items() if info.encoder is not None}


def _same_encoder(older: AnyEncoder | None, now: AnyEncoder | None) -> bool:
    """Whether they are the same; buckets by their count get the edges that the older log computed."""
    if isinstance(older, Buckets) and isinstance(now, Buckets) and now.edges is None:
        return older.step == now.step
    return older == now


def _kind_of(info: FeatureInfo) -> IdKind:
    return ("hashed" if info.hashed else "raw") if info.raw else "dense"


def _called(name: str) -> str:
    kind, word = "feature", name
    if name.startswith("context_"):
        kind, word = "context", name.removeprefix("context_")
    return f"the {kind} {word!r}"


def _shape(multi: bool, side: str) -> str:
    return f"{'multi-valued' if multi else 'single-valued'} (side {side!r})"


def _older(engine: Engine, file: Path, info: FeatureInfo) -> OlderVocabulary:
    if not info.vocabulary:
        problem = "the manifest has no digest of this vocabulary, so nobody can tell what the ids stand for"
        raise DataError(f"{problem}; name a log that `tandemrec ingest` wrote", file=file)
    rows = 1 + sum(len(values) for values in stream_values(file, info.vocabulary, of_log=True))
    if rows != info.rows:
        problem = f"has {rows} rows, unknown included, but the log's manifest says {info.rows}"
        raise DataError(f"{problem}; take another copy of that log", file=file)
    raw = look(file, ())
    found = engine.scan([raw])
    value, number = (found[f"c{raw.columns.index(name)}"] for name in ("value", "id"))
    table = found.select(value=value, id=number.cast("int64"))
    different = engine.rows(table.aggregate(values=table["value"].nunique()))[0]["values"]
    if different != rows - 1:
        raise DataError("has a value twice, or a null; name a log that `tandemrec ingest` wrote", file=file)
    return OlderVocabulary(file, table, rows)


def count_values(name: str, multi: bool, sources: Sequence[ir.Table], cutoff: int | None) -> ir.Table:
    """value, count, occurrences: one row for each distinct value of a column that is not null.

    Args:
        sources: the tables with the column `name`. `occurrences` counts in all of them, `count` in the first
            only, and there the events before the Unix second `cutoff` (None: all).
    """
    parts = []
    for number, table in enumerate(sources):
        counts = ibis.literal(number == 0) & (True if cutoff is None else table.timestamp < cutoff)
        values = table[name].unnest() if multi else table[name]
        parts.append(table.select(value=values, counted=counts.fill_null(False).cast("int64")))
    everything = reduce(lambda left, right: left.union(right), parts)
    known = everything.filter(everything["value"].notnull())
    return known.group_by("value").aggregate(
        count=known.counted.sum().cast("int64"), occurrences=known.count().cast("int64")
    )


def number_values(values: ir.Table, first: int) -> ir.Table:
    """value, id, count: dense ids from `first` in the order of the values."""
    dense = ibis.row_number().over(order_by=values["value"]) + first
    return values.mutate(id=dense.cast("int64")).select("value", "id", "count")


def without_vocabulary(
    engine: Engine, name: str, kind: IdKind, sources: Sequence[ir.Table], *, multi: bool = False
) -> Vocabulary:
    """The ids of a column that follow from each value alone.

    Args:
        kind: `raw` or `hashed`; sources: the tables that have the column.

    Raises:
        DataError: the column holds text that is to be raw, or integers that are to be hashed.
    """
    found = count_values(name, multi, sources, None)
    text = found["value"].type().is_string()
    if text != (kind == "hashed"):
        hint = 'ids = "raw"' if kind == "hashed" else 'ids = "hashed"'
        held = "integers" if kind == "hashed" else "text, or nothing,"
        also = ", or name the column in text_columns" if kind == "hashed" else ""
        raise DataError(f'holds {held} which cannot be "{kind}"; set {hint}{also}', column=name)
    ids = text_id(found["value"]) if text else found["value"].cast("int64")
    words = engine.keep(f"vocabulary_{name}", found.mutate(id=ids))
    sums = {"values": words.count(), "nothing": words.occurrences.sum(where=words.id == NOTHING)}
    totals = engine.rows(words.aggregate(**sums))[0]
    raw = RawIds(int(totals["values"]), int(totals["nothing"] or 0))
    return Vocabulary(words.select("value", "id", "count"), kind=kind, raw=raw)


def build(
    engine: Engine,
    name: str,
    sources: Sequence[ir.Table],
    older: OlderVocabulary | None,
    *,
    multi: bool = False,
    cutoff: int | None = None,
    extend: bool = True,
) -> Vocabulary:
    """The vocabulary of one column of the raw tables.

    Without an older log its ids follow the order of the values. With one, known values keep their ids, and
    new ones are either appended in their order or treated as a null is: id 0, and no member of a list.

    Args:
        sources: the tables that have the column, the events first.
        cutoff: as in `count_values`; extend: whether new values get ids.

    Raises:
        DataError: the column is text and the older values are integers, or the other way round.
    """
    found = count_values(name, multi, sources, cutoff)
    if older is None:
        return Vocabulary(engine.keep(f"vocabulary_{name}", number_values(found, 1)))
    older = _of_type(older, name, sources, multi)
    kind = older.table["value"].type()
    found = engine.keep(f"counted_{name}", found.mutate(value=found["value"].cast(kind)))
    new = engine.keep(f"new_{name}", found.anti_join(older.table, "value"))
    known = older.table.left_join(found.select("value", "count"), "value")
    known = known.select("value", "id", count=known["count"].fill_null(0).cast("int64"))
    totals = engine.rows(new.aggregate(values=new.count(), rows=new.occurrences.sum()))[0]
    # What is no item to the log still is one while it is made: a new item has attributes of its own, and is
    # not drawn as a negative for whoever had it. Only what is written forgets which one it was.
    items = name == "item_id"
    if extend or items:
        known = known.union(number_values(new, older.rows))
    return Vocabulary(
        engine.keep(f"vocabulary_{name}", known),
        None if extend or not items else older.rows,
        (int(totals["values"]), int(totals["rows"] or 0)),
    )


def _of_type(older: OlderVocabulary, name: str, sources: Sequence[ir.Table], multi: bool) -> OlderVocabulary:
    """The older vocabulary with values wide enough for those of the tables."""
    mine = sources[0][name].type()
    mine = mine.value_type if multi else mine
    theirs = older.table["value"].type()
    if older.rows > 1 and mine.is_integer() != theirs.is_integer():
        kinds = {True: "integers", False: "text"}
        hint = f"cast {name}, or name its column in text_columns"
        if mine.is_string():
            hint = f"cast {name}, or ingest that log again with its column in text_columns"
        problem = (
            f"holds {kinds[theirs.is_integer()]}, the raw tables hold {kinds[mine.is_integer()]}; {hint}"
        )
        raise DataError(problem, file=older.file, column="value")
    table = older.table.mutate(value=older.table["value"].cast("int64" if mine.is_integer() else "string"))
    return OlderVocabulary(older.file, table, older.rows)


def write(
    engine: Engine, name: str, vocabulary: Vocabulary, root: Path, multi: bool = False, side: Side = "both"
) -> FeatureInfo:
    """Writes `vocab/<name>.parquet`, if there is one, and gives what the manifest says of the column."""
    (root / "vocab").mkdir(exist_ok=True)
    if vocabulary.kind != "dense":
        return FeatureInfo(rows=1, raw=True, hashed=vocabulary.kind == "hashed", multi=multi, side=side)
    table, content, rows = vocabulary.words, hashlib.sha256(), 1
    if vocabulary.rows is not None:
        table = table.filter(table.id < vocabulary.rows)
    writer, path = None, root / "vocab" / f"{name}.parquet"
    for batch in engine.stream(table.order_by("id"), _BATCH):
        if writer is None:
            writer = pq.ParquetWriter(path, batch.schema, compression="zstd", write_page_checksum=True)
        writer.write_batch(batch)
        rows += batch.num_rows
        content.update(spell(batch.column("value")))
    if writer is not None:
        writer.close()
    else:
        # A column of nulls only: all its ids are 0.
        pq.write_table(table.schema().to_pyarrow().empty_table(), path)
    return FeatureInfo(rows=rows, vocabulary=content.hexdigest(), multi=multi, side=side)
