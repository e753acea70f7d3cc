"""What a wanted column is in each file, and the one type that all its files have in common.

A file's own type belongs to a family; a column is decided over the families of all files. Text is never
read as a number where two spellings would become one (`01` and `1`), and where a column of CSV could be
either, all of its cells decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from embeddings.errors import DataError
from pipelines.ingest.files import RawFile
from pipelines.ingest.sections import ColumnConfig, Unit
from trainer.log.arrow import is_list, is_text
from trainer.log.encoders.encoder import Encoder

Kind = Literal["key", "time", "id", "ids", "text", "number", "quantity"]
Target = Literal["int64", "string", "float64", "array<int64>", "array<string>"]
# Families of their own: a CSV cell may be anything, and a column of nulls takes the type of the others.
CSV, NULL = "csv", "null"
_WHOLE = {"int", "uint64", "float", "decimal"}
_LOOSE = {CSV, NULL}
_TOLD = 20  # problems that one message tells
_WANTED: dict[Kind, str] = {
    "key": "an integer or a string",
    "time": "unix seconds, a timestamp or text such as 2024-05-01T12:00:00Z",
    "id": "an integer or a string",
    "ids": "a list of integers or of strings (or name a separator)",
    "text": "a string, since a separator is named",
    "number": "a number or a boolean",
    "quantity": "a number, or text that spells one",
}
_ALLOWED: dict[Kind, set[str]] = {
    "key": {*_WHOLE, *_LOOSE, "text", "bool"},
    "time": {*_WHOLE, *_LOOSE, "text", "time", "date"},
    "id": {*_WHOLE, *_LOOSE, "text", "bool"},
    "ids": {NULL, "list of int", "list of uint64", "list of text", "list of null", "list of bool"},
    "text": {*_LOOSE, "text"},
    "number": {*_WHOLE, *_LOOSE, "bool"},
    "quantity": {*_WHOLE, *_LOOSE, "text", "bool"},
}
_SPELLED = {"int": "integers", "text": "text", "bool": "booleans", "float": "numbers", "decimal": "numbers"}
_SPELLED |= {"uint64": "integers", "list of int": "lists of integers", "list of text": "lists of text"}


@dataclass(frozen=True)
class ColumnNeed:
    """A column that is needed: the setting that names it, its name in the file, what it must hold.

    Attributes:
        unit: of a time that is a number.
        separator: cuts text into a list of values; empty: the cell is taken as it is.
        encoder: of a quantity, whose cells become codes.
    """

    key: str
    column: str
    kind: Kind
    unit: Unit = "s"
    separator: str = ""
    encoder: Encoder | None = None

    @staticmethod
    def of(section: str, entry: ColumnConfig) -> ColumnNeed:
        """The column of a feature or of a context."""
        if entry.encoder is not None:
            return ColumnNeed(f"{section}: {entry.name}", entry.source, "quantity", encoder=entry.encoder)
        kind: Kind = "id" if not entry.multi else ("text" if entry.separator else "ids")
        return ColumnNeed(f"{section}: {entry.name}", entry.source, kind, separator=entry.separator)

    @property
    def is_label(self) -> bool:
        return self.key.startswith("impressions.labels:")


def needs_of(section: str, entries: Mapping[str, ColumnConfig]) -> dict[str, ColumnNeed]:
    """The columns of some features or contexts, by the same names."""
    return {name: ColumnNeed.of(section, entry) for name, entry in entries.items()}


@dataclass(frozen=True)
class Column:
    """A wanted column over all files.

    Attributes:
        families: what each file holds; types: the files' own names of it, for people.
        target: what the engine makes of the column; None: integers if all values are integers, else text.
    """

    need: ColumnNeed
    families: tuple[str, ...]
    types: tuple[str, ...]
    target: Target | None

    @property
    def has_own_unit(self) -> bool:
        """Whether its times are no numbers in any file."""
        return set(self.families) <= {"time", "date", NULL}


def family(kind: pa.DataType) -> str:
    """What an Arrow type holds, however it is encoded; the name of a type that no column may have."""
    types = pa.types
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return family(kind.value_type)
    if is_list(kind):
        return f"list of {family(kind.value_type)}"
    tests: Mapping[str, bool] = {
        NULL: types.is_null(kind),
        "bool": types.is_boolean(kind),
        "uint64": types.is_uint64(kind),
        "int": types.is_integer(kind),
        "float": types.is_floating(kind),
        "decimal": types.is_decimal(kind),
        "text": is_text(kind),
        "time": types.is_timestamp(kind),
        "date": types.is_date(kind),
    }
    return next((name for name, holds in tests.items() if holds), str(kind))


def decide(
    files: Sequence[RawFile],
    wanted: Sequence[ColumnNeed],
    text_columns: Sequence[str],
    partitions: Sequence[str],
) -> list[Column]:
    """The wanted columns over all files.

    Raises:
        DataError: columns are missing or of wrong types, or files disagree: all of it in one message.
    """
    problems: list[DataError] = []
    columns: list[Column] = []
    for need in wanted:
        wrong = [error for file in files if (error := _fault(file, need, partitions))]
        problems += wrong[:2]
        if wrong:
            continue
        families, types = zip(*(_family_and_type(file, need.column) for file in files), strict=True)
        try:
            target = _target(need, files, families, types, need.column in text_columns)
        except DataError as error:
            problems.append(error)
        else:
            columns.append(Column(need, families, types, target))
    refuse(problems)
    return columns


def refuse(problems: Sequence[DataError]) -> None:
    """Raises what is wrong, all of it at once."""
    different = list({str(problem): problem for problem in problems}.values())
    if len(different) == 1:
        raise different[0]
    if different:
        told = " ".join(f"({number}) {problem}" for number, problem in enumerate(different[:_TOLD], 1))
        more = f" and {len(different) - _TOLD} more" if len(different) > _TOLD else ""
        raise DataError(f"{len(different)} problems: {told}{more}")


def _family_and_type(file: RawFile, column: str) -> tuple[str, str]:
    """Family and type of a column of one file; what its folders name is text, as CSV is."""
    if column not in file.columns:
        return CSV, "folder"
    return (CSV, "CSV") if file.format == "CSV" else (family(file.types[column]), str(file.types[column]))


def _fault(file: RawFile, need: ColumnNeed, partitions: Sequence[str]) -> DataError | None:
    column, times, problem = need.column, file.columns.count(need.column), ""
    if column in partitions and times:
        problem = "the file has this column itself; take it out of partition_columns"
    elif column in partitions and column not in file.folders:
        problem = f"partition_columns names it, but the path has no folder {column}=..."
    elif column in partitions:
        return None
    elif times > 1:
        problem = f"{times} columns have this name; rename one"
    elif not times:
        problem = _tell_missing(file, need)
    elif (held := _family_and_type(file, column)[0]) not in _ALLOWED[need.kind]:
        problem = f"type is {file.types[column]}, expected {_WANTED[need.kind]}; {_cast(need, held)}"
        if file.format == "CSV":
            problem = f"holds text, expected {_WANTED[need.kind]}"
    return DataError(problem, file=file.path, column=column) if problem else None


def _cast(need: ColumnNeed, held: str) -> str:
    """How to mend a column of a type that is not read."""
    if held.endswith(("binary", "binary_view")) or held.startswith("fixed_size_binary"):
        return "cast the column to string where the file is written"
    if held in ("time", "date"):
        return "cast the column to text, or to integers"
    if held.startswith("list of") and need.kind in ("key", "id"):
        return "set multi = true for a feature, or cast the column"
    if need.is_label:
        return "write 0 and 1, or true and false"
    return "cast the column"


def _tell_missing(file: RawFile, need: ColumnNeed) -> str:
    column = need.column
    problem = f"no such column ({need.key}); the file has {', '.join(file.columns)}"
    if column in file.folders:
        return f'{problem}; to read it from the folders, set partition_columns = ["{column}"]'
    twin = [name for name in file.columns if name.strip().lower() == column.strip().lower()]
    if twin:
        return f"{problem}; {twin[0]!r} is spelled otherwise, and names are taken letter by letter"
    if file.format == "CSV" and len(file.columns) == 1:
        return f"{problem}; set csv.delimiter if another sign parts its cells"
    if file.format == "CSV" and any(name.strip().lstrip("-").isdigit() for name in file.columns):
        return f"{problem}; the first line must hold the names of the columns"
    return problem


def _target(
    need: ColumnNeed, files: Sequence[RawFile], families: Sequence[str], types: Sequence[str], as_text: bool
) -> Target | None:
    found = set(families)
    if need.kind == "number":
        return "float64"
    if need.kind in ("time", "quantity"):
        return "int64"
    if need.kind == "text":
        return "string"
    text, other = ("list of text", "list of bool") if need.kind == "ids" else ("text", "bool")
    whole = {"list of int", "list of uint64"} if need.kind == "ids" else _WHOLE
    sides = [found & {text}, found & {other}, found & whole]
    if sum(map(bool, sides)) > 1 and not as_text:
        typed = [place for place, one in enumerate(families) if one not in (*_LOOSE, "list of null")]
        kinds = [_SPELLED.get(one, one) for one in families]
        first = typed[0]
        odd = next(place for place in typed if kinds[place] != kinds[first])
        problem = f"holds {kinds[odd]} ({types[odd]}), but {files[first].path} holds {kinds[first]}"
        problem += f" ({types[first]}); cast one of them, or name the column in text_columns"
        raise DataError(problem, file=files[odd].path, column=need.column)
    if as_text or sides[0] or sides[1] or found <= {NULL, "list of null"}:
        return "array<string>" if need.kind == "ids" else "string"
    if need.kind == "ids":
        return "array<int64>"
    # Cells of CSV, and numbers that are not int64, are integers only if each of them is.
    return "int64" if found <= {"int", NULL} else None
