"""Opens the raw files as one table: the engine reads exactly the files and columns that were checked.

Files with the same columns in the same order are read together; the others are joined by the names of their
columns. A column is first looked at as it is in the files. Then all of its cells decide what it becomes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import ibis
from ibis.expr import types as ir

from embeddings.errors import DataError
from pipelines.ingest.columns import CSV, NULL, Column, ColumnNeed, Target, decide, refuse
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.engine import Engine
from pipelines.ingest.faults import bad_cell, cells, check_rows
from pipelines.ingest.files import RawFile, RawFiles, look
from pipelines.ingest.numbers import codes, missing_and_beyond, numbers_in, odd_numbers
from pipelines.ingest.values import convert, look_at, may_be_broken, of_text
from trainer.log.encoders.buckets import Buckets
from trainer.log.schema import ColumnInfo

_TOLD = 10  # names of columns that one line lists
Part = TypeVar("Part")


@dataclass
class Survey:
    """What ingest learnt of the raw tables while it opened them, for the report.

    Attributes:
        loose: table -> its columns that were read as integers and could as well be text: of CSV, for example.
        measured: whether rows, and ranges of (table, setting): (nulls, least, greatest), are wanted.
        beyond: (table, setting) of columns with an encoder -> the numbers beyond its range.
    """

    columns: list[ColumnInfo] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    loose: dict[str, set[str]] = field(default_factory=dict)
    measured: bool = False
    rows: dict[str, int] = field(default_factory=dict)
    ranges: dict[tuple[str, str], tuple[int, Any, Any]] = field(default_factory=dict)
    beyond: dict[tuple[str, str], int] = field(default_factory=dict)


@dataclass(frozen=True)
class RawTable:
    """The files as one table; its columns have the names that the caller of `open_files` gave them.

    Attributes:
        loose: the columns that were read as integers and could as well be text.
        label: names all files in an error.
        columns: name -> the column over all files, where a fault is looked for.
    """

    table: ir.Table
    loose: set[str]
    label: str
    files: Sequence[RawFile]
    columns: Mapping[str, Column]

    def fault(self, name: str, problem: str, fits: Callable[[object], bool]) -> DataError:
        """The error about a column, with the place of the first cell that does not fit, if one is found.

        Args:
            fits: what a cell of Parquet, or the text of one of CSV, must be.
        """
        column = self.columns[name].need.column
        for file in self.files:
            odd = next((place for place, cell in cells(file, column) if not fits(cell)), None)
            if odd is not None:
                of = f" of {file.path}" if len(self.files) > 1 else ""
                return DataError(f"{problem} (the first is in {odd}{of})", file=self.label, column=column)
        return DataError(problem, file=self.label, column=column)


@dataclass(frozen=True)
class _Part:
    """Files that the engine reads as one: each column as it is in them, and its family."""

    cells: tuple[ir.Value, ...]
    families: tuple[str, ...]
    table: ir.Table


def open_files(
    engine: Engine, found: RawFiles, wanted: Mapping[str, ColumnNeed], config: IngestConfig, survey: Survey
) -> RawTable:
    """The wanted columns of all files, by the names that `wanted` gives them.

    Text with a separator becomes a list, without blanks around its values.

    Raises:
        DataError: a file is unreadable, a column is missing or of a wrong type, or a cell does not fit: of
            all files and columns at once.
    """
    wants = list(wanted.values())
    files = look_at_files(found, [need.column for need in wants], config)
    columns = decide(files, wants, config.text_columns, config.partition_columns)
    parts = _parts(engine, files, columns, config)
    facts = _facts(engine, parts, columns, files)
    bad = [(column, fact) for column, fact in zip(columns, facts, strict=True) if fact.get("bad")]
    refuse([bad_cell(files, column, fact["bad_least"], fact["bad"]) for column, fact in bad])
    targets: list[Target] = [
        column.target or ("string" if fact.get("wide") else "int64")
        for column, fact in zip(columns, facts, strict=True)
    ]
    table = all_rows([_convert_part(part, columns, targets) for part in parts])
    told = list(zip(columns, targets, facts, strict=True))
    survey.columns += [_column_info(found.what, *one) for one in told]
    survey.notes += [
        *found.notes,
        *_words(found.what, columns, facts),
        *_unused_columns(found.what, files, wants),
        *(
            f'{need.key}_unit = "{need.unit}" has no effect: the column {need.column} is '
            f"{', '.join(dict.fromkeys(column.types))}, which has a unit of its own"
            for need, column in zip(wants, columns, strict=True)
            if need.kind == "time" and need.unit != "s" and column.has_own_unit
        ),
    ]
    if survey.measured:
        # A range would hide the ends of a column.
        wide = [_without_range(column) for column in columns]
        whole = all_rows([_convert_part(part, wide, targets) for part in parts])
        _measure(engine, whole, found.what, columns, survey)
    values = {name: table[f"c{place}"] for place, name in enumerate(wanted)}
    for name, need in wanted.items():
        if need.separator:
            split = engine.split(values[name], need.separator)
            values[name] = split.map(lambda part: part.strip()).filter(lambda part: part != "")
    loose = {
        name for name, (column, target, _) in zip(wanted, told, strict=True) if _is_loose(column, target)
    }
    named = dict(zip(wanted, columns, strict=True))
    return RawTable(table.select(**values), loose, found.label, files, named)


def _is_loose(column: Column, target: Target) -> bool:
    """Whether a column was read as integers and could as well be text."""
    ids = column.need.kind not in ("time", "quantity")
    return target == "int64" and ids and set(column.families) <= {CSV, NULL}


def join_in_halves(parts: Sequence[Part], join: Callable[[Part, Part], Part]) -> Part:
    """All parts joined in halves, since a chain of a hundred is too deep for Ibis to compile."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return join(join_in_halves(parts[:half], join), join_in_halves(parts[half:], join))


def all_rows(tables: Sequence[ir.Table]) -> ir.Table:
    """The rows of tables with the same columns."""
    return join_in_halves(tables, lambda left, right: left.union(right))


def look_at_files(found: RawFiles, wanted: Sequence[str], config: IngestConfig) -> list[RawFile]:
    """The columns of every file; all that cannot be read are named at once."""
    files: list[RawFile] = []
    problems: list[DataError] = []
    for path in found.files:
        try:
            file = found.known.get(path) or look(path, wanted, config.csv.delimiter)
        except DataError as error:
            problems.append(error)
            continue
        files.append(file)
        if file.format == "Parquet":
            found.known[path] = file
    refuse(problems)
    return files


def columns_of(found: RawFiles, wanted: Sequence[str], config: IngestConfig) -> set[str]:
    """The columns that any of the files has, and those that the settings take from their folders.

    `wanted` are some columns that the files must have, which tell the delimiter of CSV.
    """
    files = look_at_files(found, wanted, config)
    return {name for file in files for name in file.columns} | {
        name for name in config.partition_columns if any(name in file.folders for file in files)
    }


def _parts(
    engine: Engine, files: Sequence[RawFile], columns: Sequence[Column], config: IngestConfig
) -> list[_Part]:
    alike: dict[Any, list[int]] = {}
    for place, file in enumerate(files):
        types = tuple(str(kind) for kind in file.types.values())
        folders = tuple(file.folders.get(name) for name in config.partition_columns)
        key = (file.columns, types, file.delimiter, file.packed, folders)
        alike.setdefault(key, []).append(place)
    parts = []
    for places in alike.values():
        first = files[places[0]]
        table = engine.scan([files[place] for place in places])
        cells = tuple(_cell(table, first, column.need.column, config) for column in columns)
        parts.append(_Part(cells, tuple(column.families[places[0]] for column in columns), table))
    return parts


def _cell(table: ir.Table, file: RawFile, name: str, config: IngestConfig) -> ir.Value:
    if name in config.partition_columns:
        value = file.folders[name]
        return ibis.null("string") if value is None else of_text(ibis.literal(value), config.csv.nulls)
    cell = table[f"c{file.columns.index(name)}"]
    return of_text(cell, config.csv.nulls) if file.format == "CSV" else cell


def _convert_part(part: _Part, columns: Sequence[Column], targets: Sequence[Target]) -> ir.Table:
    values = {}
    for place, (column, target) in enumerate(zip(columns, targets, strict=True)):
        cell, family = part.cells[place], part.families[place]
        need = column.need
        values[f"c{place}"] = (
            convert(cell, family, need.kind, target, need.unit)
            if need.encoder is None
            else codes(cell, family, need.encoder)
        )
    return part.table.select(**values)


def _facts(
    engine: Engine, parts: Sequence[_Part], columns: Sequence[Column], files: Sequence[RawFile]
) -> list[dict[str, Any]]:
    """Of each column, over all files: how many cells are bad, wide, cut and known, and the least of them."""
    looks = [_looks(part, columns, engine.lenient) for part in parts]
    kinds = {name: value.type() for look_ in looks for name, value in look_.items()}
    if not kinds:
        return [{} for _ in columns]
    tables = [
        part.table.select(**{name: look_.get(name, ibis.null(kind)) for name, kind in kinds.items()})
        for part, look_ in zip(parts, looks, strict=True)
    ]
    everything = all_rows(tables)
    sums: dict[str, ir.Value] = {}
    for name, kind in kinds.items():
        value = everything[name]
        if kind.is_string():
            sums |= {name: value.count(), f"{name}_least": value.min()}
        else:
            sums[name] = value.cast("int64").sum()
    try:
        row = engine.rows(everything.aggregate(**sums))[0]
    except Exception as error:
        # Not every engine names the file of a row that is cut short, so it is looked for here.
        check_rows(files)
        if isinstance(error, DataError) and error.file is None:
            more = f", or in one of {len(files) - 1} more files" if len(files) > 1 else ""
            raise DataError(f"{error}{more}", file=files[0].path) from error
        raise
    if row.get("odd"):
        check_rows(files)
    facts: list[dict[str, Any]] = []
    for place in range(len(columns)):
        counts = ("bad", "wide", "cut", "known", "word")
        facts.append({fact: int(row.get(f"{fact}{place}") or 0) for fact in counts})
        facts[-1] |= {f"{fact}_least": row.get(f"{fact}{place}_least") for fact in ("bad", "wide", "word")}
    return facts


def _looks(part: _Part, columns: Sequence[Column], lenient: bool) -> dict[str, ir.Value]:
    """What is computed of each column's cells: bad0, wide0, ..., bad1, ..., and `odd` of a row of CSV."""
    asked: dict[str, ir.Value] = {}
    texts = [cell for cell, family in zip(part.cells, part.families, strict=True) if family == CSV]
    if lenient and texts:
        asked["odd"] = join_in_halves(
            [may_be_broken(text) for text in texts], lambda left, right: left | right
        )
    for place, (column, cell, family) in enumerate(zip(columns, part.cells, part.families, strict=True)):
        need = column.need
        cells = (
            look_at(cell, family, need.kind, column.target, need.unit)
            if need.encoder is None
            else odd_numbers(cell, family, need.encoder)
        )
        asked |= {f"{fact}{place}": value for fact, value in cells.items()}
    return asked


def _column_info(table: str, column: Column, target: Target, fact: Mapping[str, Any]) -> ColumnInfo:
    read_as = {"int64": "integers", "string": "text", "float64": "numbers"}.get(target, f"lists ({target})")
    note = ""
    # A column of words needs no reason; one that is nearly a column of numbers does.
    if fact.get("wide") and (fact["wide"] < fact["known"] or re.match(r"\s*[+-]?\d", fact["wide_least"])):
        note = (
            f"{fact['wide']:,} cells such as {fact['wide_least']!r} are no plain spelling of a 64-bit integer"
        )
    if column.need.kind == "quantity":
        read_as = "numbers"
        if fact.get("cut"):
            feature = column.need.key.rpartition(": ")[2]
            rounded = f"{fact['cut']:,} are rounded to whole numbers for {feature}"
            note = f"{rounded}; give its encoder a step to keep more"
    if column.need.kind == "time":
        read_as = "unix seconds"
        note = f"{fact['cut']:,} times lost a part of a second" if fact.get("cut") else ""
    return ColumnInfo(
        table=table,
        setting=column.need.key,
        column=column.need.column,
        found=", ".join(dict.fromkeys(column.types)),
        read_as=read_as,
        note=note,
    )


def _words(what: str, columns: Sequence[Column], facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Notes on columns with words that may mean "no value", but are read as values."""
    told = []
    for column, fact in zip(columns, facts, strict=True):
        if fact.get("word"):
            one = f"{fact['word']:,} cells such as {fact['word_least']!r} are values like others"
            remedy = (
                "name such words in csv.nulls if they mean nothing"
                if CSV in column.families
                else "write null if they mean nothing"
            )
            told.append(f"{what}: {column.need.column}: {one}; {remedy}")
    return told


def _unused_columns(what: str, files: Sequence[RawFile], wanted: Sequence[ColumnNeed]) -> list[str]:
    used = {need.column for need in wanted}
    names = [
        name or "without a name"
        for name in dict.fromkeys(name for file in files for name in file.columns)
        if name not in used
    ]
    if not names:
        return []
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    return [
        f"{what}: nothing uses the column{'s' if len(names) > 1 else ''} {', '.join(names[:_TOLD])}{more}"
    ]


def _without_range(column: Column) -> Column:
    """With an encoder that makes the same codes, but has no range."""
    encoder = column.need.encoder
    if encoder is None:
        return column
    return replace(
        column, need=replace(column.need, encoder=Buckets(kind="buckets", step=encoder.step, edges=(0,)))
    )


def _measure(engine: Engine, table: ir.Table, what: str, columns: Sequence[Column], survey: Survey) -> None:
    """Counts the rows and the nulls, and finds the range of each column.

    Args:
        table: with codes of numbers that no range has cut.
    """
    values: dict[str, ir.Value] = {"rows": table.count()}
    for name, column in zip(table.columns, columns, strict=True):
        cell, none = table[name], table[name].isnull()
        if (encoder := column.need.encoder) is not None:
            none, beyond = missing_and_beyond(cell, encoder)
            cell = numbers_in(cell)
            values |= {f"{name}_beyond": beyond.sum()}
        values |= {f"{name}_nulls": none.sum()}
        if not cell.type().is_array():
            values |= {f"{name}_least": cell.min(), f"{name}_most": cell.max()}
    row = engine.rows(table.aggregate(**values))[0]
    survey.rows[what] = int(row["rows"])
    for place, column in enumerate(columns):
        least, most = (row.get(f"c{place}_{end}") for end in ("least", "most"))
        encoder = column.need.encoder
        if encoder is not None:
            survey.beyond[what, column.need.key] = int(row[f"c{place}_beyond"] or 0)
        if encoder is not None and encoder.step != 1:
            # What was measured are steps, and people know the column's unit.
            least, most = (None if end is None else end * encoder.step for end in (least, most))
        survey.ranges[what, column.need.key] = (int(row[f"c{place}_nulls"] or 0), least, most)


def unread_settings(config: IngestConfig, survey: Survey) -> list[str]:
    """Notes on columns that text_columns or partition_columns names, though no setting reads them."""
    read = {column.column for column in survey.columns}
    lists = {"text_columns": config.text_columns, "partition_columns": config.partition_columns}
    return [
        f"{setting} names {name!r}, a column that no other setting names"
        for setting, names in lists.items()
        for name in names
        if name not in read
    ]
