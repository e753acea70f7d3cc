"""The colours of charts. In the page they are variables, so that the same drawing fits light and dark."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipelines.analyze.report.model import Bars, Chart, Figure, HeatMap, Intervals, Lines

INK, SOFT, GRID, GREY, PAPER = "#1c2431", "#5b6777", "#e3e8ee", "#98a2af", "#fefefe"
# After Okabe and Ito (2008), told apart by people of any colour vision; a little darker on white.
SERIES = ("#0b68a8", "#d1600c", "#0a8f68", "#b5579b", "#3f9ad1", "#b98900", "#6b4fa0", "#8a5a35")
Dash = Literal["solid", "dashed", "dashdot", "dotted"]
_DASHES: tuple[Dash, ...] = ("solid", "dashdot", "dotted")
_MARKERS = "osD^vP"
# Of references, all of them grey.
_GREY_DASHES: tuple[Dash, ...] = ("dashed", "dotted", "dashdot", "solid")
_GREY_MARKERS = "x+12"
# What the page calls them.
VARIABLES: Mapping[str, str] = {
    **{INK: "--ink", SOFT: "--soft", GRID: "--grid", GREY: "--grey", PAPER: "--paper"},
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES)},
}
_COLOUR = re.compile("|".join(map(re.escape, VARIABLES)))


@dataclass(frozen=True)
class Look:
    """How one series looks in all charts of a figure."""

    colour: str
    dash: Dash = "solid"
    marker: str = "o"
    reference: bool = False


def names_of(chart: Chart) -> list[str]:
    """The names of a chart's series."""
    if isinstance(chart, Lines):
        return [line.name for line in chart.lines]
    if isinstance(chart, HeatMap):
        return []
    if isinstance(chart, Intervals):
        return [row.series for row in chart.rows if row.series]
    return list(chart.bars if isinstance(chart, Bars) else chart.points)


def looks_of(figure: Figure) -> dict[str, Look]:
    """Name of a series -> how it looks, in all charts of the figure; those that are references come last."""
    names = list(dict.fromkeys(name for chart in figure.charts for name in names_of(chart)))
    looks = {}
    for number, name in enumerate(name for name in names if name not in figure.references):
        turn, place = divmod(number, len(SERIES))
        looks[name] = Look(
            SERIES[place], _DASHES[turn % len(_DASHES)], _MARKERS[(turn + place) % len(_MARKERS)]
        )
    for number, name in enumerate(name for name in figure.references if name in names):
        turn = number % len(_GREY_DASHES)
        looks[name] = Look(GREY, _GREY_DASHES[turn], _GREY_MARKERS[turn], reference=True)
    return looks


def with_variables(svg: str) -> str:
    """The drawing with variables of the page in the place of its colours."""
    return _COLOUR.sub(lambda found: f"var({VARIABLES[found[0]]})", svg)
