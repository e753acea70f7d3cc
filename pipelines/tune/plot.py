"""A picture of a study: its course, a panel for each parameter, and which parameters mattered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pipelines.analyze.report.draw import STYLE
from pipelines.analyze.report.palette import GREY, INK, SERIES
from pipelines.tune.report import Findings, TrialRow, value_text
from pipelines.tune.space import Parameter

_ACROSS, _WIDTH, _HEIGHT, _DPI = 3, 4.2, 3.0, 150
# State -> marker, colour and what the legend calls it.
_LOOKS = {
    "complete": ("o", SERIES[0], "complete"),
    "pruned": ("v", SERIES[1], "pruned, its last validation"),
}
_BEST, _DEFAULT = SERIES[2], GREY


def plot_study(found: Findings, path: Path) -> bool:
    """Draw a study as PNG -> whether there was anything to draw: a trial with a validation."""
    rows = [row for row in found.rows if _height(row) is not None and row.state in _LOOKS]
    if not rows:
        return False
    panels = 1 + len(found.plan.parameters) + bool(found.importance)
    across = 2 if panels == 4 else min(panels, _ACROSS)
    down = -(-panels // across)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH * across, _HEIGHT * down + 0.5), dpi=_DPI, layout="constrained")
        title = f"{found.plan.config.stem}: validation {found.plan.settings.metric} of {len(rows)} trial(s)"
        if found.missing:
            title += f" (importance needs {found.missing} more complete one(s))"
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        axes = [figure.add_subplot(down, across, place + 1) for place in range(panels)]
        _course(axes[0], found, rows)
        for panel, parameter in zip(axes[1:], found.plan.parameters, strict=False):
            _slice(panel, parameter, found, rows)
        if found.importance:
            _importance(axes[-1], found)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=len(labels))
        figure.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})
    return True


def _height(row: TrialRow) -> float | None:
    return row.value if row.value is not None else row.last


def _course(axes: Axes, found: Findings, rows: Sequence[TrialRow]) -> None:
    """Values by trial, the best so far, and the configuration as it is."""
    _points(axes, rows, [row.trial for row in rows])
    complete = {row.trial: row.value for row in rows if row.value is not None}
    better: Callable[[float, float], float] = min if found.plan.lower_is_better else max
    if complete:
        best = list(accumulate(complete.values(), better))
        axes.step(list(complete), best, where="post", color=_BEST, label="best so far")
    if found.default is not None:
        label = "the configuration as it is"
        axes.axhline(found.default.value or 0.0, color=_DEFAULT, linestyle="dashed", zorder=1, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title="course of the study", xlabel="trial", ylabel=found.plan.settings.metric)


def _slice(axes: Axes, parameter: Parameter, found: Findings, rows: Sequence[TrialRow]) -> None:
    """Values by what a parameter was."""
    own = [row for row in rows if parameter.name in row.parameters]
    if parameter.ranged:
        places: list[Any] = [row.parameters[parameter.name] for row in own]
        axes.set_xlim(*_widened(parameter))
        if parameter.log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        places = [parameter.choices.index(row.parameters[parameter.name]) for row in own]
        names = [value_text({"": choice}, "") for choice in parameter.choices]
        axes.set_xticks(range(len(names)), names)
    _points(axes, own, places)
    for row, place in zip(own, places, strict=True):
        if row is found.best:
            axes.scatter(
                [place], [row.value or 0.0], s=110, facecolors="none", edgecolors=_BEST, linewidths=1.6
            )
    axes.set(title=parameter.name, xlabel="value", ylabel=found.plan.settings.metric)


def _widened(parameter: Parameter) -> tuple[float, float]:
    """A range with a twentieth of room on either side, on its own scale."""
    low, high = parameter.corners
    if parameter.log:
        room = (high / low) ** 0.05
        return low / room, high * room
    room = 0.05 * (high - low)
    return low - room, high + room


def _points(axes: Axes, rows: Sequence[TrialRow], places: Sequence[Any]) -> None:
    for state, (marker, colour, label) in _LOOKS.items():
        own = [(row, place) for row, place in zip(rows, places, strict=True) if row.state == state]
        if own:
            across, up = [place for _, place in own], [_height(row) or 0.0 for row, _ in own]
            axes.scatter(across, up, marker=marker, color=colour, s=26, label=label, zorder=3)


def _importance(axes: Axes, found: Findings) -> None:
    """The share of each parameter, the largest on top."""
    names = sorted(found.importance, key=lambda name: found.importance[name])
    axes.barh(names, [found.importance[name] for name in names], color=SERIES[0], height=0.6)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set(title="importance (PED-ANOVA)", xlabel="share")
