"""Each kind of chart on the axes of matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipelines.analyze.report.model import Bars, Chart, HeatMap, Intervals, Lines, Numbers, Points
from pipelines.analyze.report.palette import GREY, INK, SERIES, Look

Looks = Mapping[str, Look]
# Columns of a heat map that are wide enough for their numbers, and digits after the point that fit in.
_WRITTEN, _DIGITS = 8, 3
_LONG = 9
# Letters of a name that take half of a chart's width.
_LETTERS = 36
# Letters of a standing name that there is room for below a chart, and inches of each more.
_SHORT, _LETTER = 14, 0.07
# Letters of a standing name of a column: longer ones would take the room of their heat map.
_COLUMN = 18
# Lines of at most so many points have markers.
_FEW = 12
# Letters below a chart that have room side by side.
_ACROSS = 32
# Points that a marker of a line is wide.
_SIZE = 4.5
# Inches of a chart: so wide that its letters can still be read on a phone.
WIDTH = 3.8


def draw(axes: Axes, chart: Chart, looks: Looks) -> None:
    """Draw a chart with its title and axes, but without a legend."""
    axes.set_title(short(chart.title))
    _KINDS[type(chart)](axes, chart, looks)


def short(name: str, letters: int = _LETTERS) -> str:
    """A name that leaves room for its chart: of a long one both ends, since names often differ there."""
    line = " ".join(name.split())
    return line if len(line) <= letters else f"{line[: letters // 2 - 1]}\u2026{line[-letters // 2 :]}"


def size_of(chart: Chart, looks: Looks) -> tuple[float, float]:
    """Width and height in inches that a chart wants."""
    if isinstance(chart, Bars) and lies(chart):
        return WIDTH, 0.8 + len(chart.groups) * (0.1 + 0.13 * _most_bars(chart, looks))
    if isinstance(chart, Intervals):
        return WIDTH, 0.75 + 0.2 * len(chart.rows)
    if isinstance(chart, HeatMap):
        below = max(map(len, _columns(chart)), default=0) if _stand(chart) else 0
        return WIDTH, min(9.0, max(2.2, 1.2 + 0.22 * len(chart.y))) + _LETTER * max(0, below - _SHORT)
    return WIDTH, 2.5


def lies(chart: Bars) -> bool:
    """Whether its bars lie, since the names of its groups would not fit below them."""
    return any(len(name) > _LONG for name in chart.groups) or len(chart.groups) > 12


def _lines(axes: Axes, chart: Lines, looks: Looks) -> None:
    for line in chart.lines:
        look = looks[line.name]
        dash = "dashed" if line.dashed and not look.reference else look.dash
        # Two points of a reference are a straight line.
        few = len(line.x) <= _FEW and not (look.reference and len(line.x) == 2)
        (drawn,) = axes.plot(line.x, line.y, color=look.colour, linestyle=dash, zorder=2 + look.reference)
        drawn.set(marker=look.marker if few else "", markersize=_SIZE)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=look.colour, alpha=0.16, linewidth=0)
    _name_axes(axes, chart.x_label, chart.y_label)
    _scale(axes, chart.log_x, chart.log_y)
    low, high = axes.get_ylim()
    if not chart.log_y and 0 < low < 0.4 * high:
        axes.set_ylim(bottom=0)
    whole = all(float(x).is_integer() for line in chart.lines for x in line.x)
    if whole and not chart.log_x:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _bars(axes: Axes, chart: Bars, looks: Looks) -> None:
    """The bars that a group has side by side; references are strokes over the bars of their group."""
    lying, places = lies(chart), np.arange(len(chart.groups), dtype=float)
    own = [name for name in chart.bars if not looks[name].reference]
    there = np.isfinite(np.array([chart.bars[name] for name in own])).reshape(len(own), len(places))
    width, before = 0.8 / _most_bars(chart, looks), np.cumsum(there, axis=0) - 1
    for number, name in enumerate(own):
        shift = (before[number] - (there.sum(0) - 1) / 2) * width
        draw_bars = axes.barh if lying else axes.bar
        draw_bars(
            places + shift, np.array(chart.bars[name]), width * 0.9, color=looks[name].colour, linewidth=0
        )
        _whiskers(axes, places + shift, chart, name, lying)
    for name in chart.bars:
        if looks[name].reference:
            strokes = axes.vlines if lying else axes.hlines
            look, at = looks[name], (chart.bars[name], places - 0.44, places + 0.44)
            strokes(*at, colors=look.colour, linestyles=look.dash, linewidth=2)
    axis = axes.yaxis if lying else axes.xaxis
    axis.set_ticks(places, [short(name) for name in chart.groups])
    axis.set_tick_params(length=0)
    axis.grid(False)
    if lying:
        axes.set_ylim(len(chart.groups) - 0.5, -0.5)
        axes.set_xlabel(short(chart.y_label))
        axes.xaxis.set_major_locator(MaxNLocator(5))
    else:
        axes.set_ylabel(short(chart.y_label))


def _most_bars(chart: Bars, looks: Looks) -> int:
    """Of one group."""
    own = [values for name, values in chart.bars.items() if not looks[name].reference]
    return int(np.isfinite(np.array(own)).sum(0).max(initial=1)) if own else 1


def _whiskers(axes: Axes, at: Any, chart: Bars, name: str, lying: bool) -> None:
    if chart.low is None or chart.high is None or name not in chart.low or name not in chart.high:
        return
    low, high = np.array(chart.low[name]), np.array(chart.high[name])
    strokes = axes.hlines if lying else axes.vlines
    strokes(at, low, high, colors=INK, linewidth=1)


def _heat_map(axes: Axes, chart: HeatMap, looks: Looks) -> None:
    values = np.ma.masked_invalid(
        np.array([list(row) for row in chart.values], dtype=float).reshape(len(chart.y), len(chart.x))
    )
    low, high = (float(values.min()), float(values.max())) if values.count() else (0.0, 1.0)
    if chart.centre is not None:
        reach = max(high - chart.centre, chart.centre - low) or 1.0
        low, high = chart.centre - reach, chart.centre + reach
    colours = mpl.colormaps["cividis" if chart.centre is None else "RdBu_r"].with_extremes(bad=GREY)
    mesh = axes.pcolormesh(values, cmap=colours, vmin=low, vmax=high if high > low else low + 1, linewidth=0)
    mesh.set_rasterized(values.size > 1024)
    axes.set_xticks(np.arange(len(chart.x)) + 0.5, _columns(chart))
    axes.set_yticks(np.arange(len(chart.y)) + 0.5, [short(name) for name in chart.y])
    if _stand(chart):
        axes.tick_params(axis="x", rotation=90)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.grid(False)
    _name_axes(axes, chart.x_label, chart.y_label)
    bar = axes.figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.03)
    bar.outline.set_visible(False)
    if len(chart.x) <= _WRITTEN:
        _write_values(axes, values, mesh)


def _columns(chart: HeatMap) -> list[str]:
    """The names below it; those that stand are shortened further as long as they still differ."""
    names = [short(name, _COLUMN) for name in chart.x] if _stand(chart) else []
    return names if len(set(names)) == len(chart.x) else [short(name) for name in chart.x]


def _stand(chart: HeatMap) -> bool:
    """Whether the names below it stand, since they would not fit side by side."""
    return sum(map(len, chart.x)) > _ACROSS


def _write_values(axes: Axes, values: Any, mesh: Any) -> None:
    """Two digits of the largest, and of the others as many places."""
    largest = float(np.abs(values).max()) if values.count() else 0.0
    places = max(0, 1 - math.floor(math.log10(largest))) if largest > 0 else 0
    if places > _DIGITS:
        return
    shades = mesh.to_rgba(values)[..., :3] @ (0.299, 0.587, 0.114)
    for (y, x), value in np.ndenumerate(values):
        if not np.ma.is_masked(value):
            colour = "white" if shades[y, x] < 0.55 else "black"
            text = f"{value:,.{places}f}"
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7, color=colour)


def _points(axes: Axes, chart: Points, looks: Looks) -> None:
    for name, (x, y) in chart.points.items():
        look, many = looks[name], len(x) > 300
        texts = (chart.labels or {}).get(name, ())
        axes.scatter(
            *(x, y),
            s=7 if many else 20,
            alpha=0.45 if many else 0.9,
            color=look.colour,
            marker=look.marker,
            # Markers of references are strokes.
            linewidths=1.2 if look.reference else 0,
            rasterized=len(x) > 2000,
        )
        for text, at in zip(texts, zip(x, y, strict=True), strict=False):
            axes.annotate(text, at, (4, 3), textcoords="offset points", fontsize=7.5)
    _name_axes(axes, chart.x_label, chart.y_label)
    _scale(axes, chart.log_x, chart.log_y)


def _intervals(axes: Axes, chart: Intervals, looks: Looks) -> None:
    places = np.arange(len(chart.rows))
    if chart.reference is not None:
        axes.axvline(chart.reference, color=GREY, linewidth=1.2, linestyle="dashed")
    own = [looks.get(row.series, Look(SERIES[0])) for row in chart.rows]
    axes.hlines(
        places, _of(chart, "low"), _of(chart, "high"), colors=[look.colour for look in own], linewidth=2
    )
    for row, place, look in zip(chart.rows, places, own, strict=True):
        axes.plot(row.value, place, look.marker, color=look.colour, markersize=5)
    axes.set_yticks(places, [short(row.name) for row in chart.rows])
    axes.set_ylim(max(len(chart.rows), 1) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.yaxis.grid(False)
    axes.set_xlabel(short(chart.x_label))
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _of(chart: Intervals, part: str) -> Numbers:
    return [getattr(row, part) for row in chart.rows]


def _name_axes(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(short(x))
    axes.set_ylabel(short(y))


def _scale(axes: Axes, log_x: bool, log_y: bool) -> None:
    """Logarithmic axes; where nothing is above zero they stay linear."""
    for wanted, name in ((log_x, "x"), (log_y, "y")):
        shown = [v for line in axes.lines for v in np.atleast_1d(getattr(line, f"get_{name}data")())]
        shown += [v for cloud in axes.collections for v in np.ravel(cloud.get_offsets())]
        if wanted and any(value > 0 for value in shown):
            getattr(axes, f"set_{name}scale")("log")
            # Those of matplotlib are formulas.
            getattr(axes, f"{name}axis").set_major_formatter(FuncFormatter(_power))


def _power(value: float, place: object) -> str:
    """A power of ten as people write it."""
    return f"{value:,.0f}" if 1 <= value < 1e6 else f"{value:g}"


_KINDS: Mapping[type, Callable[[Axes, Any, Looks], None]] = {
    Lines: _lines,
    Bars: _bars,
    HeatMap: _heat_map,
    Points: _points,
    Intervals: _intervals,
}
