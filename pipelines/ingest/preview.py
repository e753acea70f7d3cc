"""What ingest understood of the raw tables, for people."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from pipelines.ingest.sources import Seen
from trainer.log.schema import ColumnInfo

_HEAD = ("column", "named by", "type", "read as", "nulls", "from", "to")
_LONGEST = 28
_TOO_LATE = 253_402_300_800  # the year 10,000: no date can be shown


def column_lines(columns: Sequence[ColumnInfo], notes: Sequence[str]) -> list[str]:
    """One line a table whose files do not say their types, and one for everything remarkable."""
    lines = []
    for table in dict.fromkeys(column.table for column in columns):
        theirs = [column for column in columns if column.table == table]
        if any("CSV" in column.found for column in theirs):
            told = dict.fromkeys(f"{column.column} {column.read_as}" for column in theirs)
            lines.append(f"{table}, read from CSV: {', '.join(told)}")
    return list(dict.fromkeys([*lines, *_noted(columns), *notes]))


def preview_lines(seen: Seen) -> list[str]:
    """Every column that a setting names with its range (times in UTC), and those that none names."""
    lines: list[str] = []
    for table in dict.fromkeys(column.table for column in seen.columns):
        theirs = [column for column in seen.columns if column.table == table]
        ranges = [seen.ranges.get((table, column.setting), (0, None, None)) for column in theirs]
        cells = [
            (one.column, one.setting, one.found, one.read_as, f"{nulls:,}", _cut(one, least), _cut(one, most))
            for one, (nulls, least, most) in zip(theirs, ranges, strict=True)
        ]
        lines += [f"{table}: {seen.rows.get(table, 0):,} rows", *_aligned([_HEAD, *cells])]
    return lines + list(dict.fromkeys([*_noted(seen.columns), *seen.notes]))


def _noted(columns: Sequence[ColumnInfo]) -> list[str]:
    return [f"{one.table}: {one.column} is read as {one.read_as}: {one.note}" for one in columns if one.note]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _cut(column: ColumnInfo, value: object) -> str:
    """A value as it is meant: a day and a time, or a number without a needless point."""
    text = "" if value is None else repr(value)
    if isinstance(value, float):
        text = f"{value:g}"
    if column.read_as == "unix seconds" and isinstance(value, int) and 0 <= value < _TOO_LATE:
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S")
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
