"""Figures as pictures: an SVG a chart for the page, and one PNG of the whole figure. No display is needed."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from pipelines.analyze.report.charts import WIDTH, draw, short, size_of
from pipelines.analyze.report.model import Chart, Figure
from pipelines.analyze.report.palette import GRID, INK, PAPER, SOFT, Look, looks_of, with_variables

_STYLE: dict[Any, Any] = {
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
_FONT = re.compile(r"font: ([^;\"]*?px) [^;\"]*")
_TAG = re.compile(r"<[^>]*>")
_HEAD = re.compile(r"^.*?(?=<svg)", re.DOTALL)


@contextmanager
def _style() -> Iterator[None]:
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
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
        canvas = Canvas(figsize=(WIDTH * across, sum(heights) + 0.9), layout="constrained")
        canvas.suptitle(figure.title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        grid = canvas.add_gridspec(max(1, len(rows)), across, height_ratios=heights or [1])
        for down, row in enumerate(rows):
            for right, chart in enumerate(row):
                draw(canvas.add_subplot(grid[down, right]), chart, looks)
        if len(looks) > 1:
            columns = min(len(looks), 2 * across)
            canvas.legend(handles=_handles(looks), loc="outside lower left", ncols=columns)
        canvas.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})


def _handles(looks: dict[str, Look]) -> list[Line2D]:
    return [
        Line2D([], [], color=look.colour, linestyle=look.dash, label=short(name))
        for name, look in looks.items()
    ]
