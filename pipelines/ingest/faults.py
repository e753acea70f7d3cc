"""Faults of the raw tables and of the engine's work: the place of a cell that does not fit, and what an
engine's message asks the user to do."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import chain

import pyarrow.parquet as pq

from embeddings.errors import ConfigError, DataError, TandemError
from pipelines.ingest.columns import Column
from pipelines.ingest.files import RawFile, open_text

_MEMORY = re.compile(r"^Out of Memory Error|OutOfMemory|GC overhead limit", re.IGNORECASE)
_DISK = re.compile(r"No space left|offload data block|max_temp_directory_size|Disk quota|database is full")
_FILE = re.compile(
    r"^(IO|Permission|HTTP) Error|IOException|FileNotFound|FAILED_READ_FILE"
    r"|Failed to read file|decompress|TProtocolException",
    re.IGNORECASE,
)
_VALUE = re.compile(
    r"^(Conversion|Invalid Input|Out of Range|Mismatch Type|Type|Invalid type|Constraint|Serialization) Error"
    r"|CAST_|MALFORMED|OVERFLOW|NumberFormat|DateTimeException|ArithmeticException|BadRecord",
    re.IGNORECASE,
)
_OURS = re.compile(r"^(INTERNAL|FATAL|Parser|Syntax) Error|^\[INTERNAL_ERROR", re.IGNORECASE)
_HINTS = {
    "number": "a number, true or false; mend the cell",
    "quantity": "a number, true or false; mend the cell, or leave it empty",
    "label": "a number; for a label write 0 and 1, or true and false",
    "time": "unix seconds or ISO 8601 such as 2024-05-01T12:00:00Z; mend the cell, or convert the column",
    "id": "a whole number (a float is one up to 2^53); cast the column to text, or mend it",
    "key": "a whole number (a float is one up to 2^53); cast the column to text, or mend it",
}


def bad_cell(files: Sequence[RawFile], column: Column, cell: str, count: int) -> DataError:
    """The error about `count` cells of a column, with the place of one of them."""
    need = column.need
    problem = f"{cell!r} is not {_HINTS['label' if need.is_label else need.kind]}"
    if count > 1:
        problem += f" ({count:,} such cells)"
    for file in files:
        for row, value in cells(file, need.column):
            same = value is not None and str(value) == cell
            if isinstance(value, float):  # the engine may spell it in another way
                same = value == number_of(cell)
            if same:
                return DataError(f"{row}: {problem}", file=file.path, column=need.column)
    more = f" and {len(files) - 1} more files" if len(files) > 1 else ""
    return DataError(problem, file=f"{files[0].path}{more}", column=need.column)


def number_of(cell: object) -> float | None:
    """The number of a cell; None where it holds something else."""
    word = str(cell).strip().lower()
    if word in ("true", "false"):
        return float(word == "true")
    try:
        return float(word)
    except ValueError:
        return None


def cells(file: RawFile, column: str) -> Iterator[tuple[str, object]]:
    """The cells of one column with their places: `line 7` of CSV, else `row 7`.

    There is none of a column that the names of folders hold, for example.
    """
    if column not in file.columns:
        return
    if file.format == "CSV":
        place = file.columns.index(column)
        for line, row in _rows(file):
            if len(row) > place:
                yield f"line {line}", row[place]
        return
    with pq.ParquetFile(file.path) as parquet:
        batches = (batch.column(0).to_pylist() for batch in parquet.iter_batches(columns=[column]))
        for number, value in enumerate(chain.from_iterable(batches)):
            yield f"row {number}", value


def _rows(file: RawFile) -> Iterator[tuple[int, list[str]]]:
    """(line on which it ends, cells) of every row after the header."""
    with open_text(file.path) as lines:
        reader = csv.reader(lines, delimiter=file.delimiter, strict=True)
        header = True
        for row in reader:
            if row and not header:
                yield reader.line_num, row
            header = header and not row


def check_rows(files: Sequence[RawFile]) -> None:
    """Raises for the first row of CSV that has too many or too few cells, or cannot be read at all."""
    for file in files:
        if file.format != "CSV":
            continue
        line = 1
        try:
            for line, row in _rows(file):
                if len(row) != len(file.columns):
                    names = ", ".join(file.columns)
                    problem = f"{len(row)} cells, but the header has {len(file.columns)} ({names})"
                    raise DataError(f"line {line}: {problem}; mend the line", file=file.path)
        except UnicodeDecodeError as error:
            raise DataError(
                f"after line {line}: no UTF-8 text ({error}); save it as UTF-8", file=file.path
            ) from error
        except (csv.Error, OSError, EOFError) as error:
            raise DataError(f"after line {line}: {error}; mend the line", file=file.path) from error


def explain(text: str) -> TandemError | None:
    """An engine's error for the user; None where neither data nor machine can be at fault, but this code."""
    # The one line of a message that says something: of a Java trace the last cause.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    causes = [line.removeprefix("Caused by: ") for line in lines if line.startswith("Caused by: ")]
    called = [line.removeprefix(": ") for line in lines if line.startswith(": ")]
    line = (causes[-1:] or called or lines or ["no reason given"])[0]
    if _OURS.search(line):
        return None
    if _DISK.search(text):
        problem = "the disk under --out has no room for the tables between two steps"
        return DataError(f"{problem}: {line}; free some, or write to another disk")
    if _MEMORY.search(line):
        problem = f"raise engine.memory_limit or engine.buckets ({line})"
        return ConfigError(f"engine.memory_limit is too small for these tables: {problem}")
    if _FILE.search(line):
        return DataError(f"the engine cannot read or write a file: {line}; mend that, and ingest again")
    if _VALUE.search(line):
        problem = f"the tables hold a value that does not fit its column: {line}"
        return DataError(f"{problem}; mend it, or name the column in text_columns")
    problem = f"the engine cannot work with these tables: {line}"
    return DataError(f"{problem}; look at the names and types of their columns")
