"""A report of every kind of chart, with names that come from anywhere."""

from __future__ import annotations

import numpy as np

from pipelines.analyze.report.model import (
    Bars,
    Figure,
    Finding,
    HeatMap,
    Interval,
    Intervals,
    Line,
    Lines,
    Points,
    Report,
    Section,
    Table,
)

NAN = float("nan")
HOSTILE = '<img src=x onerror="fail()"> $a_b$ & "c"'


def every_chart() -> Figure:
    rng = np.random.default_rng(3)
    line = Line("a", range(4), [1 / 3, NAN, 0.5, 2.0], low=[0, 0, 0, 1], high=[1, 1, 1, 3])
    return Figure(
        "every-chart",
        "Every kind of chart",
        "What is drawn. How to read it.",
        (
            Lines("Lines", "step", "loss", (line, Line(HOSTILE, range(4), [1, 2, 3, 4])), log_y=True),
            Bars(
                "Bars",
                "share",
                ("x", "y"),
                {"a": [1, NAN], "usual": [2, 1]},
                {"a": [0, NAN]},
                {"a": [2, NAN]},
            ),
            Bars("Bars that lie", "share", ("attention / item_id", HOSTILE), {"a": [1, 2], "b": [3, 4]}),
            HeatMap(
                "Heat map", "key", "query", ("k0", "k1", "k2"), ("q0", "q1"), rng.normal(size=(2, 3)), 0.0
            ),
            Points("Points", "x", "y", {"a": (rng.random(9), rng.random(9)), "b": ([], [])}, log_x=True),
            Intervals(
                "Intervals", "AUC", (Interval("cold", 0.7, 0.6, 0.8), Interval("warm", NAN, NAN, NAN)), 0.75
            ),
        ),
        references=("usual",),
    )


def small_report(title: str = "Analysis of a run") -> Report:
    rows = (
        ("b", 10, 0.25, True),
        ("a", 9, NAN, False),
        (HOSTILE, 100, 1e-9, None),
        ("c", -1, 12345.678, True),
    )
    table = Table("numbers", "Numbers", "Four rows.", ("name", "rows", "share", "known"), rows)
    findings = (
        Finding("notice", "Something may be worth a look.", "every-chart"),
        Finding("alarm", f"{HOSTILE} is wrong.", "numbers"),
    )
    sections = (
        Section(
            "first", "First", "What it is about.", (every_chart(), table), findings, ("A part is left out.",)
        ),
        Section("second", "Second", "Nothing to draw."),
    )
    return Report(title, Table("runs", "Runs", "One.", ("run",), (("run",),)), sections, {"command": HOSTILE})
