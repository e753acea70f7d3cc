"""Tables of the page: what a cell shows, what it is sorted by, and the numbers behind a chart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pipelines.analyze.report.model import (
    Bars,
    Cell,
    Chart,
    Figure,
    HeatMap,
    Intervals,
    Line,
    Lines,
    Points,
    Table,
)

# Rows of numbers that a page shows of a chart.
_MOST = 300
# A dash, where there is no value.
_NONE = "\u2013"


@dataclass(frozen=True)
class Shown:
    """A cell or the name of a column: its text, what it is sorted by (empty: no value), and its side."""

    text: str
    value: str
    side: str


@dataclass(frozen=True)
class Column:
    """The name of a column, and whether it is sorted as numbers."""

    name: str
    kind: str
    side: str


@dataclass(frozen=True)
class Grid:
    """A table as it is shown; `note` stands above it."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Shown]]
    note: str = ""


def grid_of(columns: Sequence[str], rows: Iterable[Sequence[Cell]], note: str = "") -> Grid:
    """Columns of numbers to the right, columns of texts to the left."""
    every = [list(row) for row in rows]
    texts = [any(isinstance(row[place], str) for row in every) for place in range(len(columns))]
    named = [
        Column(name, "text" if text else "number", "text" if text else "")
        for name, text in zip(columns, texts, strict=True)
    ]
    places = [_places([row[place] for row in every]) for place in range(len(columns))]
    shown = [
        [
            Shown(_text(cell, digits), _value(cell), "text" if text else "")
            for cell, text, digits in zip(row, texts, places, strict=True)
        ]
        for row in every
    ]
    return Grid(named, shown, note)


def cells_of(table: Table) -> Grid:
    return grid_of(table.columns, table.rows)


def numbers_of(figure: Figure) -> Iterator[Grid]:
    """The numbers of each chart, of long ones the first."""
    for chart in figure.charts:
        columns, rows = _TABLES[type(chart)](chart)
        some = list(islice(rows, _MOST + 1))
        note = chart.title
        if len(some) > _MOST:
            note, some = f"{chart.title}: the first {_MOST} rows; the JSON file has all.", some[:_MOST]
        yield grid_of(columns, some, note)


def _places(cells: Iterable[Cell]) -> int:
    """Digits after the point that give the largest number of a column four digits."""
    sizes = [abs(cell) for cell in cells if isinstance(cell, float) and math.isfinite(cell) and cell]
    if all(size.is_integer() for size in sizes):
        return 0
    return min(4, max(0, 3 - math.floor(math.log10(max(sizes)))))


def _text(cell: Cell, places: int) -> str:
    """All of an integer, and of another number so many digits that a column reads well."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return _NONE
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        tiny_or_huge = cell and not 10.0 ** (1 - places) <= abs(cell) < 1e9
        return f"{cell:.3g}" if tiny_or_huge else f"{cell:,.{places}f}"
    return cell


def _value(cell: Cell) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return str(int(cell)) if isinstance(cell, bool) else str(cell)


_Rows = tuple[Sequence[str], Iterable[Sequence[Cell]]]


def _of_lines(chart: Lines) -> _Rows:
    """A row a place of x and a column a line, where all have the same places; else one line after another."""
    banded = any(line.low is not None for line in chart.lines)
    same = len({tuple(line.x) for line in chart.lines}) == 1
    if same and not banded:
        columns = [chart.x_label, *(line.name for line in chart.lines)]
        return columns, zip(chart.lines[0].x, *(line.y for line in chart.lines), strict=True)
    columns = ["line", chart.x_label, chart.y_label, *(["low", "high"] if banded else [])]
    return columns, (row for line in chart.lines for row in _of_line(line, banded))


def _of_line(line: Line, banded: bool) -> Iterator[Sequence[Cell]]:
    nothing = [math.nan] * len(line.x)
    ends = [line.low or nothing, line.high or nothing] if banded else []
    for row in zip(line.x, line.y, *ends, strict=True):
        yield line.name, *row


def _of_bars(chart: Bars) -> _Rows:
    parts: dict[str, Any] = {}
    for name, values in chart.bars.items():
        parts[name] = values
        for end, ends in (("low", chart.low), ("high", chart.high)):
            if ends and name in ends:
                parts[f"{name}, {end}"] = ends[name]
    return ["", *parts], zip(chart.groups, *parts.values(), strict=True)


def _of_heat_map(chart: HeatMap) -> _Rows:
    rows = ((name, *row) for name, row in zip(chart.y, chart.values, strict=True))
    return [f"{chart.y_label} \\ {chart.x_label}", *chart.x], rows


def _of_points(chart: Points) -> _Rows:
    rows = ((name, *point) for name, (x, y) in chart.points.items() for point in zip(x, y, strict=True))
    return ["points", chart.x_label, chart.y_label], rows


def _of_intervals(chart: Intervals) -> _Rows:
    return ["", chart.x_label, "low", "high"], ((r.name, r.value, r.low, r.high) for r in chart.rows)


_TABLES: Mapping[type[Chart], Any] = {
    Lines: _of_lines,
    Bars: _of_bars,
    HeatMap: _of_heat_map,
    Points: _of_points,
    Intervals: _of_intervals,
}
