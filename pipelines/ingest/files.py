"""Finds the raw files and looks at their columns, before an engine opens any of them.

A file is named by its path, a pattern or a folder. What is found here is a list of exact paths: the engines
open these and nothing else, whatever characters they hold.
"""

from __future__ import annotations

import csv
import glob
import gzip
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.errors import DataError
from pipelines.ingest.downloads import downloads

Files = Path | str | Sequence[Path | str]
Format = Literal["Parquet", "CSV"]
DELIMITERS = (",", "\t", ";", "|")
TEXT_TABLES = (".csv", ".tsv", ".txt", ".inter")
_JSON = (".json", ".jsonl", ".ndjson")
_PACKED = (".zst", ".bz2", ".xz", ".zip", ".lz4")
_MAGIC = b"PAR1"
# A folder with one of these is a table whose own log says which of its files count.
_LAKES = {"_delta_log": "Delta Lake", ".hoodie": "Hudi"}
# RecBole writes the type of a column behind its name.
_RECBOLE = re.compile(r":(token|float|token_seq|float_seq)$")
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class RawFiles:
    """The exact files of one table, in the order of their names, and what was left out on the way."""

    what: str
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    # Parquet files that were looked at before; there may be thousands, on slow storage.
    known: dict[Path, RawFile] = field(default_factory=dict, compare=False)

    @property
    def label(self) -> str:
        """All of them, for an error that no single one of them is known to have caused."""
        more = f" and {len(self.files) - 1} more files" if len(self.files) > 1 else ""
        return f"{self.files[0]}{more}"


@dataclass(frozen=True)
class RawFile:
    """One file as it is: what ingest checks is what the engine reads.

    Attributes:
        columns: their names in the file's order.
        types: Arrow type of each Parquet column; a CSV file has none.
        delimiter, packed: of a CSV file: the sign between two cells, and whether gzip packed it.
        folders: name -> value of the `name=value` folders of the path; None: Hive's word for no value.
    """

    path: Path
    format: Format
    columns: tuple[str, ...]
    types: Mapping[str, pa.DataType] = field(default_factory=dict)
    delimiter: str = ""
    packed: bool = False
    folders: Mapping[str, str | None] = field(default_factory=dict)


def find_files(patterns: Files, what: str) -> RawFiles:
    """The files that paths, folders and patterns such as `logs/*.parquet` name.

    A file that is named twice, by two spellings or through a link, is one file. Files whose name begins with
    `_` or `.` are markers of other programs: they are read only if they are named exactly.

    Raises:
        DataError: there is none, or Parquet and CSV files are mixed.
    """
    several = patterns if isinstance(patterns, Sequence) and not isinstance(patterns, str) else [patterns]
    given = [downloads.local(pattern) for pattern in several]
    found: dict[str, Path] = {}
    skipped: list[Path] = []
    notes: list[str] = []
    for pattern in given:
        for path in _named(pattern, what, skipped):
            first = found.setdefault(os.path.realpath(path), path)
            if first != path:
                notes.append(f"{what}: {path} is {first} again, so it is read once")
    if skipped:
        names = ", ".join(sorted({path.name for path in skipped})[:5])
        notes.append(f"{what}: {len(skipped)} files that hold no data were left out ({names})")
    files = tuple(found.values())
    if len({_is_text(path) for path in files}) > 1:
        odd = next(path for path in files if _is_text(path) != _is_text(files[0]))
        raise DataError(f"Parquet and CSV are mixed in the {what}; convert one to the other", file=odd)
    return RawFiles(what, files, tuple(notes))


def _named(pattern: Path | str, what: str, skipped: list[Path]) -> list[Path]:
    exact = Path(pattern)
    if exact.is_file():
        return [exact]
    hits = [exact] if exact.is_dir() else sorted(map(Path, glob.glob(str(pattern), recursive=True)))
    files: list[Path] = []
    for hit in hits:
        if _is_marker(hit.name) and hit != exact:
            skipped += [] if hit.is_dir() else [hit]
        elif hit.is_dir():
            # A pattern with ** finds the files of a folder besides the folder.
            files += _below(hit, skipped) if "**" not in str(pattern) or hit == exact else []
        else:
            files.append(hit)
    if not files:
        empty = "holds no data file" if exact.is_dir() else "no such file"
        where = "" if exact.is_absolute() or exact.is_dir() else f" in {Path.cwd()}"
        raise DataError(f"{empty}{where}; name a Parquet or CSV file of {what}", file=exact)
    return files


def _below(folder: Path, skipped: list[Path]) -> list[Path]:
    """All data files of a folder and of those in it."""
    files: list[Path] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        # A link may lead to a folder above it.
        if os.path.realpath(place) in map(os.path.realpath, Path(place).parents):
            folders.clear()
            continue
        if lake := next((name for name in folders if name in _LAKES), None):
            problem = f"is a {_LAKES[lake]} table: some of its files may be no part of it any more; export it"
            raise DataError(f"{problem} to plain Parquet, or name the files", file=place)
        # A day of a log is `day=1`; `_temporary` and `.snapshots` are no part of it.
        folders[:] = sorted(name for name in folders if not _is_marker(name))
        for name in sorted(names):
            path = Path(place) / name
            holds = not _is_marker(name) and (_is_text(path) or _is_json(path) or _is_parquet(path))
            (files if holds else skipped).append(path)
    return files


def _is_marker(name: str) -> bool:
    return name.startswith(("_", "."))


def _plain(path: Path) -> str:
    return path.name.lower().removesuffix(".gz")


def _is_text(path: Path) -> bool:
    return _plain(path).endswith(TEXT_TABLES)


def _is_json(path: Path) -> bool:
    return _plain(path).endswith(_JSON)


def _is_parquet(path: Path) -> bool:
    if path.name.lower().endswith((".parquet", ".pq")):
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == _MAGIC
    except OSError:
        return False


def look(path: Path, wanted: Iterable[str], delimiter: str = "") -> RawFile:
    """The columns of one file.

    Args:
        wanted: names of columns that are looked for, which tell the delimiter of a CSV file.
        delimiter: of CSV files; empty: found out.

    Raises:
        DataError: the file is unreadable, or of another format.
    """
    try:
        if _is_text(path):
            return _look_at_text(path, set(wanted), delimiter)
        _refuse_others(path)
        schema = pq.read_schema(path)
    except FileNotFoundError as error:
        raise DataError("no such file", file=path) from error
    except (OSError, EOFError, UnicodeError, csv.Error, pa.ArrowException) as error:
        what = "CSV" if _is_text(path) else "Parquet"
        raise DataError(f"not readable as one {what} file: {error}; write it again", file=path) from error
    types = {name: schema.field(place).type for place, name in enumerate(schema.names)}
    return RawFile(path, "Parquet", tuple(schema.names), types, folders=folders_of(path))


def _refuse_others(path: Path) -> None:
    if _is_json(path):
        hint = "convert it, for example with DuckDB: COPY (FROM read_json('in.jsonl')) TO 'out.parquet'"
        raise DataError(f"JSON is not read; {hint}", file=path)
    if path.name.lower().endswith(_PACKED):
        raise DataError("is packed in a way that is not read; unpack it, or pack CSV with gzip", file=path)
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        raise DataError("is empty; remove it, or write it again", file=path)
    if start != _MAGIC:
        hint = f"name it {', '.join(TEXT_TABLES)} if it is a table of text with a header (.gz may follow)"
        raise DataError(f"is no Parquet file; {hint}", file=path)


def _look_at_text(path: Path, wanted: set[str], delimiter: str) -> RawFile:
    # Bytes that are no UTF-8 may stand anywhere in the first piece that is read; where, is told later.
    start, quotes = [], 0
    with open_text(path, "surrogateescape") as lines:
        # The header may hold quoted line ends: it stops where the quotes are even.
        for line in lines:
            start.append(line)
            quotes += line.count('"')
            if quotes % 2 == 0 and line.strip():
                break
    if "".join(start).startswith(_MAGIC.decode()):
        raise DataError("is a Parquet file; name it .parquet", file=path)
    if any("\udc80" <= sign <= "\udcff" for line in start for sign in line):
        raise DataError("the names of the columns are no UTF-8 text; save it as UTF-8", file=path)
    if not start:
        raise DataError("is empty: it has no line with the names of its columns", file=path)
    if not start[0].strip():
        # The engines disagree about what comes after such a line.
        raise DataError("begins with a blank line; the first must hold the names of the columns", file=path)
    headers = {}
    for sign in [delimiter] if delimiter else DELIMITERS:
        names = next((row for row in csv.reader(start, delimiter=sign) if row), [])
        if _plain(path).endswith(".inter"):
            names = [_RECBOLE.sub("", name) for name in names]
        headers[sign] = tuple(names)
    chosen = max(headers, key=lambda sign: (len(wanted & set(headers[sign])), len(headers[sign])))
    packed = path.name.lower().endswith(".gz")
    return RawFile(path, "CSV", headers[chosen], {}, chosen, packed, folders_of(path))


def open_text(path: Path, errors: str = "strict") -> IO[str]:
    """A file of UTF-8 text, unpacked if its name ends in .gz, without a byte order mark."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as raw:
        if raw.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError("is UTF-16 text; save it as UTF-8", file=path)
    return opener(path, "rt", encoding="utf-8-sig", errors=errors, newline="")


def folders_of(path: Path) -> dict[str, str | None]:
    """The `name=value` folders of a path, unescaped as Hive and Spark escape them."""
    parts = [part.partition("=") for part in path.parts[:-1] if not part.startswith("=")]
    return {
        unquote(name): None if value == _NO_VALUE else unquote(value) for name, sign, value in parts if sign
    }
