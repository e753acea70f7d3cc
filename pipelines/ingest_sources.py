"""Opens the raw files as one table: the engine reads exactly the files and columns that were checked.

Files with the same columns in the same order are read together, and what differs is joined by name. Every
column is first seen as it is, then all cells decide what it becomes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import ibis
from ibis.expr import types as ir

from embeddings.errors import DataError
from pipelines.ingest_columns import CSV, NULL, Column, Kind, Target, Wanted, decide, refuse
from pipelines.ingest_engine import Engine
from pipelines.ingest_faults import bad_cell, check_rows
from pipelines.ingest_files import FoundFiles, RawFile, look
from pipelines.ingest_values import Cells, convert, look_at, of_text
from trainer.data.ingest_config import IngestConfig
from trainer.data.schema import ColumnInfo


@dataclass
class Seen:
    """What was found on the way, for the report.

    Attributes:
        loose: table -> its columns that were read as integers and could as well be text: of CSV, for example.
        measured: whether rows, and ranges of (table, setting): (nulls, least, greatest), are wanted.
    """

    columns: list[ColumnInfo] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    loose: dict[str, set[str]] = field(default_factory=dict)
    measured: bool = False
    rows: dict[str, int] = field(default_factory=dict)
    ranges: dict[tuple[str, str], tuple[int, Any, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class RawTable:
    """The files as one table; columns are asked for by their names in the files."""

    table: ir.Table
    names: Mapping[tuple[str, Kind], str]
    loose: frozenset[tuple[str, Kind]]

    def values(self, column: str, kind: Kind) -> ir.Value:
        return self.table[self.names[column, kind]]


def open_files(
    engine: Engine, found: FoundFiles, wanted: Iterable[Wanted], config: IngestConfig, seen: Seen
) -> RawTable:
    """The wanted columns of all files.

    Raises:
        DataError: a file is unreadable, a column is missing or of a wrong type, or a cell does not fit: of
            all files and columns at once.
    """
    wanted = list(wanted)
    files = look_at_files(found, [want.column for want in wanted], config)
    columns = decide(files, wanted, config.text_columns, config.partition_columns)
    groups = _groups(files, config)
    facts = _facts(engine, groups, columns, files, config)
    targets = _settled(files, columns, facts)
    parts = []
    for group in groups:
        raw = engine.scan(group)
        cells = {
            f"c{place}": convert(
                _cell(raw, group[0], column, config),
                _family(columns, place, files, group[0]),
                column.want.kind,
                target,
                column.want.unit,
            )
            for place, (column, target) in enumerate(zip(columns, targets, strict=True))
        }
        parts.append(raw.select(**cells))
    seen.notes += found.notes
    told = zip(columns, targets, facts, strict=True)
    seen.columns += [_understood(found.what, column, target, fact) for column, target, fact in told]
    used = {want.column for want in wanted}
    unused = [
        name for name in dict.fromkeys(name for file in files for name in file.columns) if name not in used
    ]
    if unused:
        names_told = ", ".join(unused[:10]) + (f" and {len(unused) - 10} more" if len(unused) > 10 else "")
        seen.notes.append(f"{found.what}: not read, since no setting names them: {names_told}")
    names = {(column.want.column, column.want.kind): f"c{place}" for place, column in enumerate(columns)}
    loose = {
        (column.want.column, column.want.kind)
        for column, target in zip(columns, targets, strict=True)
        if target == "int64" and set(column.families) <= {CSV, NULL}
    }
    table = _joined(parts)
    if seen.measured:
        _measure(engine, table, found.what, columns, seen)
    return RawTable(table, names, frozenset(loose))


def _measure(engine: Engine, table: ir.Table, what: str, columns: Sequence[Column], seen: Seen) -> None:
    """Counts the rows and the nulls, and finds the range of each column."""
    values: dict[str, ir.Value] = {"rows": table.count()}
    for name in table.columns:
        values |= {f"{name}_nulls": table[name].isnull().sum()}
        if not table[name].type().is_array():
            values |= {f"{name}_least": table[name].min(), f"{name}_most": table[name].max()}
    row = engine.rows(table.aggregate(**values))[0]
    seen.rows[what] = int(row["rows"])
    for place, column in enumerate(columns):
        least, most = (row.get(f"c{place}_{end}") for end in ("least", "most"))
        seen.ranges[what, column.want.key] = (int(row[f"c{place}_nulls"] or 0), least, most)


def look_at_files(found: FoundFiles, wanted: Sequence[str], config: IngestConfig) -> list[RawFile]:
    """The columns of every file; all that cannot be read are named at once."""
    files: list[RawFile] = []
    problems: list[DataError] = []
    for path in found.files:
        try:
            files.append(look(path, wanted, config.csv.delimiter))
        except DataError as error:
            problems.append(error)
    refuse(problems)
    return files


def columns_of(found: FoundFiles, wanted: Sequence[str], config: IngestConfig) -> set[str]:
    """The columns that any of the files has, and those that the settings take from their folders.

    `wanted` are some columns that the files must have, which tell the delimiter of CSV.
    """
    files = look_at_files(found, wanted, config)
    return {name for file in files for name in file.columns} | {
        name for name in config.partition_columns if any(name in file.folders for file in files)
    }


def _groups(files: Sequence[RawFile], config: IngestConfig) -> list[list[RawFile]]:
    """Files that an engine can read as one."""
    groups: dict[Any, list[RawFile]] = {}
    for file in files:
        types = tuple(str(kind) for kind in file.types.values())
        folders = tuple(file.folders.get(name) for name in config.partition_columns)
        key = (file.columns, types, file.delimiter, file.packed, folders)
        groups.setdefault(key, []).append(file)
    return list(groups.values())


def _cell(table: ir.Table, file: RawFile, column: Column, config: IngestConfig) -> ir.Value:
    name = column.want.column
    if name in config.partition_columns:
        value = file.folders[name]
        return ibis.null("string") if value is None else of_text(ibis.literal(value), config.csv.nulls)
    value = table[f"c{file.columns.index(name)}"]
    return of_text(value, config.csv.nulls) if file.format == "CSV" else value


def _family(columns: Sequence[Column], place: int, files: Sequence[RawFile], file: RawFile) -> str:
    return columns[place].families[files.index(file)]


def _joined(parts: Sequence[ir.Table]) -> ir.Table:
    return reduce(lambda left, right: left.union(right), parts)


def _facts(
    engine: Engine,
    groups: Sequence[Sequence[RawFile]],
    columns: Sequence[Column],
    files: Sequence[RawFile],
    config: IngestConfig,
) -> list[dict[str, Any]]:
    """Of each column: how many cells are bad, wide or cut, and the least of them, over all files."""
    sums: dict[str, ir.Value] = {}
    parts: list[ir.Table] = []
    for group in groups:
        table = engine.scan(group)
        values: dict[str, ir.Value] = {}
        for place, column in enumerate(columns):
            cell = _cell(table, group[0], column, config)
            family = _family(columns, place, files, group[0])
            found = look_at(cell, family, column.want.kind, column.target, column.want.unit)
            values |= _named(place, found)
        parts.append(table.select(**values) if values else table.select(nothing=ibis.null("string")))
    names = sorted({name for part in parts for name in part.columns if name != "nothing"})
    if not names:
        return [{} for _ in columns]
    blank = {name: ibis.null("int64" if name.startswith(("cut", "known")) else "string") for name in names}
    parts = [
        part.select(**{name: part[name] if name in part.columns else blank[name] for name in names})
        for part in parts
    ]
    everything = _joined(parts)
    for name in names:
        sums |= (
            {name: everything[name].sum()}
            if name.startswith(("cut", "known"))
            else {name: everything[name].count(), f"{name}_least": everything[name].min()}
        )
    try:
        row = engine.rows(everything.aggregate(**sums))[0]
    except Exception:
        # The engines' own words for a row that is cut short do not name the file on every engine.
        check_rows(files)
        raise
    return [_of_column(row, place) for place in range(len(columns))]


def _named(place: int, found: Cells) -> dict[str, ir.Value]:
    values: dict[str, ir.Value] = {}
    if found.bad is not None:
        values[f"bad{place}"] = found.bad
    if found.wide is not None:
        values[f"wide{place}"] = found.wide
    if found.cut is not None:
        values[f"cut{place}"] = found.cut.cast("int64")
    if found.known is not None:
        values[f"known{place}"] = found.known.cast("int64")
    return values


def _of_column(row: Mapping[str, Any], place: int) -> dict[str, Any]:
    kinds = ("bad", "wide", "cut", "known")
    found = {kind: int(row.get(f"{kind}{place}") or 0) for kind in kinds}
    return found | {f"{kind}_least": row.get(f"{kind}{place}_least") for kind in kinds}


def _settled(
    files: Sequence[RawFile], columns: Sequence[Column], facts: Sequence[Mapping[str, Any]]
) -> list[Target]:
    told = list(zip(columns, facts, strict=True))
    refuse(
        [bad_cell(files, column, fact["bad_least"], fact["bad"]) for column, fact in told if fact.get("bad")]
    )
    return [column.target or ("string" if fact.get("wide") else "int64") for column, fact in told]


def _understood(table: str, column: Column, target: Target, fact: Mapping[str, Any]) -> ColumnInfo:
    types = ", ".join(dict.fromkeys(column.types))
    read_as = {"int64": "integers", "string": "text", "float64": "numbers"}.get(target, f"lists ({target})")
    note = ""
    # A column of words needs no reason; one that is nearly a column of numbers does.
    if fact.get("wide") and (fact["wide"] < fact["known"] or CSV not in column.families):
        note = (
            f"{fact['wide']:,} cells such as {fact['wide_least']!r} are no plain spelling of a 64-bit integer"
        )
    if column.want.kind == "time":
        read_as = "unix seconds"
        note = f"{fact['cut']:,} times lost a part of a second" if fact.get("cut") else ""
    return ColumnInfo(
        table=table,
        setting=column.want.key,
        column=column.want.column,
        found=types,
        read_as=read_as,
        note=note,
    )
