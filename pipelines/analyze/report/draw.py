"""Figures as pictures: an SVG a chart for the page, and one PNG of the whole figure. No display is needed."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.text import Text

from pipelines.analyze.report.charts import WIDTH, draw, short, size_of
from pipelines.analyze.report.model import Chart, Figure
from pipelines.analyze.report.palette import GRID, INK, PAPER, SOFT, Look, looks_of, with_variables

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": SOFT,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": SOFT,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "figure.facecolor": PAPER,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "svg.hashsalt": "tandemrec",
    "text.color": INK,
    # Names of features may hold dollar signs.
    "text.parse_math": False,
    "xtick.color": SOFT,
    "xtick.labelsize": 8,
    "ytick.color": SOFT,
    "ytick.labelsize": 8,
}
_PER_ROW, _DPI = 3, 150
# Inches that a letter of a figure's title takes about, and a line of it.
_TITLE_LETTER, _TITLE_LINE = 0.09, 0.18
_FONT = re.compile(r"font: ([^;\"]*?px) [^;\"]*")
_TAG = re.compile(r"<[^>]*>")
_HEAD = re.compile(r"^.*?(?=<svg)", re.DOTALL)


@contextmanager
def _style() -> Iterator[None]:
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        # The page has all letters; a picture lacks those that its font lacks.
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def svgs_of(figure: Figure) -> list[str]:
    """A drawing for each chart, to stand in a page that defines the variables of `palette`."""
    looks = looks_of(figure)
    with _style():
        return [_svg(f"{figure.name}-{number}", chart, looks) for number, chart in enumerate(figure.charts)]


def _svg(name: str, chart: Chart, looks: dict[str, Look]) -> str:
    canvas = Canvas(figsize=size_of(chart, looks), layout="constrained")
    canvas.patch.set_visible(False)
    axes = canvas.add_subplot()
    draw(axes, chart, looks)
    # The page has the title in its own letters.
    axes.set_title("")
    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.id": name}):
        canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = _HEAD.sub("", out.getvalue(), count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    # Texts stay as they are, whatever a name looks like.
    return _TAG.sub(
        lambda tag: with_variables(_own_ids(_FONT.sub(r"font: \1 var(--font)", tag[0]), name)), text
    )


def _own_ids(svg: str, name: str) -> str:
    """Ids that no other drawing of the page has."""
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)


def write_png(figure: Figure, path: Path) -> None:
    """All charts of a figure with its title and its legend, on white."""
    looks = looks_of(figure)
    across = min(_PER_ROW, max(1, len(figure.charts)))
    rows = [figure.charts[first : first + across] for first in range(0, len(figure.charts), across)]
    heights = [max(size_of(chart, looks)[1] + 0.2 for chart in row) for row in rows]
    with _style():
        width, lines = WIDTH * across, textwrap.wrap(figure.title, int(WIDTH * across / _TITLE_LETTER))
        height = sum(heights) + 0.9 + _TITLE_LINE * max(0, len(lines) - 1)
        # Letters are measured at the resolution that they are drawn in: their widths are whole pixels.
        canvas = Canvas(figsize=(width, height), dpi=_DPI, layout="constrained")
        title = canvas.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=11, fontweight="bold")
        charts = list[tuple[Axes, int]]()
        grid = canvas.add_gridspec(max(1, len(rows)), across, height_ratios=heights or [1])
        for down, row in enumerate(rows):
            for right, chart in enumerate(row):
                charts.append((canvas.add_subplot(grid[down, right]), right + 1))
                draw(charts[-1][0], chart, looks)
        if len(looks) > 1:
            columns = min(len(looks), 2 * across)
            canvas.legend(handles=_handles(looks), loc="outside lower left", ncols=columns)
        _fit_titles(canvas, title, charts, across)
        canvas.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})


def _fit_titles(canvas: Canvas, title: Text, charts: list[tuple[Axes, int]], across: int) -> None:
    """Titles that would be cut off or run into the next chart begin farther left, or get smaller.

    Args:
        charts: axes, and which of the `across` columns of the canvas they are in, from 1.
    """
    canvas.draw_without_rendering()
    _shrink(title, title.get_window_extent().width, 0.97 * canvas.bbox.width)
    column = canvas.bbox.width / across
    for axes, number in charts:
        own = axes.set_title(axes.get_title(loc="left"))
        wide = _shrink(own, own.get_window_extent().width, 0.97 * column)
        over = axes.bbox.x0 + wide - (number - 0.015) * column
        if over > 0:
            own.set_x(-over / axes.bbox.width)


def _shrink(text: Text, width: float, room: float) -> float:
    """The width of a text that is at most as wide as its room."""
    if width <= room:
        return width
    text.set_fontsize(float(text.get_fontsize()) * room / width)
    return room


def _handles(looks: dict[str, Look]) -> list[Line2D]:
    return [
        Line2D([], [], color=look.colour, linestyle=look.dash, label=short(name))
        for name, look in looks.items()
    ]
