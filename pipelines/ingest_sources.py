"""Finds the raw files, checks that they have the columns that are wanted, and opens them as one table."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
from ibis.expr import types as ir

from embeddings.errors import DataError
from pipelines.ingest_engine import Engine

Kind = Literal["integer", "id", "ids", "text", "number"]
Files = Path | str | Sequence[Path | str]
_WANTED: dict[Kind, str] = {
    "integer": "an integer",
    "id": "an integer or a string",
    "ids": "a list of integers or of strings (or name a separator)",
    "text": "a string, since a separator is named",
    "number": "a number or a boolean",
}
_CSV_TYPES = {"integer": "int64", "number": "float64", "string": "string"}


@dataclass(frozen=True)
class Wanted:
    """A column that is needed: the setting that names it, its name in the file, what it must hold."""

    key: str
    column: str
    kind: Kind


def find_files(patterns: Files, what: str) -> list[Path]:
    """The files that paths and patterns such as `logs/*.parquet` name, in the order of their names.

    Raises:
        DataError: there is none, or Parquet and CSV files are mixed.
    """
    given = [patterns] if isinstance(patterns, Path | str) else list(patterns)
    found: list[Path] = []
    for pattern in given:
        exact = Path(pattern)
        hits = [exact] if exact.is_file() else sorted(map(Path, glob.glob(str(pattern), recursive=True)))
        files = [path for path in hits if path.is_file()]
        if not files:
            raise DataError(f"no such file; name a Parquet or CSV file of {what}", file=exact)
        found += [path for path in files if path not in found]
    if len({_is_csv(path) for path in found}) > 1:
        odd = next(path for path in found if _is_csv(path) != _is_csv(found[0]))
        raise DataError(f"Parquet and CSV are mixed in the {what}; convert one to the other", file=odd)
    return found


def open_files(
    engine: Engine, files: Sequence[Path], wanted: Iterable[Wanted], text_columns: Sequence[str]
) -> ir.Table:
    """The files as one table, after a look at the columns of each.

    Raises:
        DataError: a file is unreadable, or a column is missing or of a wrong type.
    """
    wanted = list(wanted)
    first: dict[str, str] = {}
    for path in files:
        schema = _schema(path)
        kinds = {want.column: _check(want, schema, path, text_columns) for want in wanted}
        for column, kind in kinds.items():
            if first.setdefault(column, kind) != kind:
                problem = f"holds {kind}, but {files[0]} holds {first[column]}; cast one of them"
                raise DataError(problem, file=path, column=column)
    if not _is_csv(files[0]):
        return engine.read_parquet(files)
    types = {name: _CSV_TYPES[first.get(name, "string")] for name in _schema(files[0]).names}
    return engine.read_csv(files, types)


def columns_of(files: Sequence[Path]) -> list[str]:
    """The column names of the first file."""
    return list(_schema(files[0]).names)


def _is_csv(path: Path) -> bool:
    return path.name.endswith((".csv", ".csv.gz"))


def _schema(path: Path) -> pa.Schema:
    what = "CSV" if _is_csv(path) else "Parquet"
    try:
        if _is_csv(path):
            with pc.open_csv(path) as reader:
                return reader.schema
        return pq.read_schema(path)
    except FileNotFoundError as error:
        raise DataError("no such file", file=path) from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"not readable as one {what} file: {error}", file=path) from error


def _check(want: Wanted, schema: pa.Schema, path: Path, text_columns: Sequence[str]) -> str:
    """What the column holds, in words; `open_files` compares them over files."""
    if want.column not in schema.names:
        problem = f"no such column ({want.key}); the file has {', '.join(schema.names)}"
        raise DataError(problem, file=path, column=want.column)
    kind = schema.field(want.column).type
    if _is_csv(path) and (want.column in text_columns or want.kind == "text" or pa.types.is_null(kind)):
        kind = pa.string() if want.kind in ("id", "text") else kind
    found = _describe(kind)
    allowed: dict[Kind, set[str]] = {
        "integer": {"integer"},
        "id": {"integer", "string"},
        "ids": {"list of integer", "list of string"},
        "text": {"string"},
        "number": {"integer", "number"},
    }
    if found not in allowed[want.kind]:
        hint = ", in unix seconds" if want.key.endswith("timestamp") else ""
        problem = f"type is {kind}, expected {_WANTED[want.kind]}{hint}; cast the column"
        raise DataError(problem, file=path, column=want.column)
    return "number" if want.kind == "number" and _is_csv(path) else found


def _describe(kind: pa.DataType) -> str:
    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind):
        return f"list of {_describe(kind.value_type)}"
    # An unsigned 64-bit id may not fit the int64 of the log.
    if types.is_integer(kind) and kind != pa.uint64():
        return "integer"
    if types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind):
        return "number"
    return "string" if types.is_string(kind) or types.is_large_string(kind) else str(kind)


def any_file(files: Files) -> Path:
    """One path to name in an error about several files."""
    return Path(files if isinstance(files, Path | str) else files[0])
