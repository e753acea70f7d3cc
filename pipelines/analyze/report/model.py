"""What a report holds: sections of figures and tables, with their numbers; nothing here draws.

All classes are frozen and hold plain tuples of floats, so that a report can be compared, kept and written as
JSON. NaN means that there is no value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Numbers: TypeAlias = Sequence[float] | npt.NDArray[Any]
Level = Literal["alarm", "notice"]
Cell = str | int | float | bool | None
# Names become names of files and anchors in the page.
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


def _plain(values: Numbers | None) -> tuple[float, ...] | None:
    """Floats of Python; None stays."""
    return None if values is None else tuple(float(value) for value in values)


def _plain_each(values: Mapping[str, Numbers] | None) -> dict[str, tuple[float, ...]] | None:
    return None if values is None else {name: _plain(each) or () for name, each in values.items()}


def _same_length(what: str, *several: Sized | None) -> None:
    """Raises ValueError where those that are there have different lengths."""
    lengths = {len(each) for each in several if each is not None}
    if len(lengths) > 1:
        raise ValueError(f"{what} has series of different lengths: {sorted(lengths)}")


def _set(record: object, **fields: object) -> None:
    for name, value in fields.items():
        object.__setattr__(record, name, value)


@dataclass(frozen=True)
class Line:
    """One line of a chart; `low` and `high` are the borders of a band around it."""

    name: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    dashed: bool = False

    def __post_init__(self) -> None:
        _set(self, x=_plain(self.x), y=_plain(self.y), low=_plain(self.low), high=_plain(self.high))
        _same_length(self.name, self.x, self.y, self.low, self.high)


@dataclass(frozen=True)
class Lines:
    """Lines over a common axis."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Bars:
    """For each group, one bar of each name; `low` and `high` are the ends of their intervals."""

    title: str
    y_label: str
    groups: tuple[str, ...]
    bars: Mapping[str, Numbers]
    low: Mapping[str, Numbers] | None = None
    high: Mapping[str, Numbers] | None = None

    def __post_init__(self) -> None:
        _set(self, groups=tuple(self.groups))
        _set(self, bars=_plain_each(self.bars), low=_plain_each(self.low), high=_plain_each(self.high))
        parts = [self.bars, self.low or {}, self.high or {}]
        _same_length(self.title, self.groups, *(each for part in parts for each in part.values()))


@dataclass(frozen=True)
class HeatMap:
    """A matrix as colours: `values[y][x]`. Where `centre` is given, colours part there to both sides."""

    title: str
    x_label: str
    y_label: str
    x: tuple[str, ...]
    y: tuple[str, ...]
    values: Sequence[Numbers]
    centre: float | None = None

    def __post_init__(self) -> None:
        _set(self, x=tuple(self.x), y=tuple(self.y), values=tuple(_plain(row) for row in self.values))
        _same_length(self.title, self.y, self.values)
        _same_length(self.title, self.x, *self.values)


@dataclass(frozen=True)
class Points:
    """Clouds of points by name, as (x, y); `labels` are texts beside the points of a cloud."""

    title: str
    x_label: str
    y_label: str
    points: Mapping[str, tuple[Numbers, Numbers]]
    labels: Mapping[str, Sequence[str]] | None = None
    log_x: bool = False
    log_y: bool = False

    def __post_init__(self) -> None:
        _set(self, points={name: (_plain(x), _plain(y)) for name, (x, y) in self.points.items()})
        for name, (x, y) in self.points.items():
            _same_length(name, x, y, (self.labels or {}).get(name))


@dataclass(frozen=True)
class Interval:
    """A value with its interval; intervals of the same `series`, such as a config, have one colour."""

    name: str
    value: float
    low: float
    high: float
    series: str = ""

    def __post_init__(self) -> None:
        _set(self, value=float(self.value), low=float(self.low), high=float(self.high))


@dataclass(frozen=True)
class Intervals:
    """Values with their intervals, one below the other; `reference` is a line through all of them."""

    title: str
    x_label: str
    rows: tuple[Interval, ...]
    reference: float | None = None


Chart: TypeAlias = Lines | Bars | HeatMap | Points | Intervals


@dataclass(frozen=True)
class Figure:
    """Charts side by side.

    Attributes:
        name: of its files NAME.png and NAME.json, and of its place in the page; unique in a report.
        caption: whole sentences: what is drawn, how it was measured, how to read it.
        references: names of lines, bars or points that the others are compared with; they are drawn in grey.
    """

    name: str
    title: str
    caption: str
    charts: tuple[Chart, ...]
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _set(self, name=_checked(self.name), charts=tuple(self.charts), references=tuple(self.references))


@dataclass(frozen=True)
class Table:
    """Rows of cells under the names of their columns; `name` as in `Figure`."""

    name: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        rows = tuple(tuple(_cell(value) for value in row) for row in self.rows)
        _set(self, name=_checked(self.name), columns=tuple(self.columns), rows=rows)
        _same_length(self.title, self.columns, *self.rows)


@dataclass(frozen=True)
class Finding:
    """What stands out: an `alarm` only where something is wrong.

    `figure` is the name of the one that shows it, empty where none does. `compares`: it says how configs
    differ.
    """

    level: Level
    text: str
    figure: str = ""
    compares: bool = False


@dataclass(frozen=True)
class Section:
    """One question and its answers.

    Attributes:
        skipped: what could not be measured, a whole sentence each that says what would make it possible.
    """

    name: str
    title: str
    introduction: str
    figures: tuple[Figure | Table, ...] = ()
    findings: tuple[Finding, ...] = ()
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """All sections, and what was analysed.

    Attributes:
        runs: a table of the runs; facts: name -> text, such as versions and the command.
    """

    title: str
    runs: Table
    sections: tuple[Section, ...]
    facts: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [figure.name for figure in self.figures()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"several figures of the report are called {', '.join(twice)}")

    def figures(self) -> Iterable[Figure | Table]:
        """The table of runs, then the figures of all sections."""
        yield self.runs
        for section in self.sections:
            yield from section.figures

    @property
    def findings(self) -> list[Finding]:
        """Of all sections, alarms first, then those that compare configs."""
        every = [finding for section in self.sections for finding in section.findings]
        return sorted(every, key=lambda finding: (finding.level != "alarm", not finding.compares))


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a figure: it takes small letters, digits, '-' and '_'")
    return name


def _cell(value: Any) -> Cell:
    """A number of numpy as one of Python."""
    plain: Cell = value.item() if isinstance(value, np.generic) else value
    return plain
