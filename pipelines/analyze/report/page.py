"""The page of a report: one HTML file that needs nothing else, made of `page.html` beside this module.

Names of features and runs come from anywhere: the template escapes whatever is no drawing of ours, and the
page forbids itself to load anything.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pipelines.analyze.report.cells import cells_of, numbers_of
from pipelines.analyze.report.draw import svgs_of
from pipelines.analyze.report.model import Figure, Report, Section
from pipelines.analyze.report.palette import SERIES, VARIABLES, Look, looks_of

_TEMPLATE = Path(__file__).with_name("page.html")
_STROKES = {"solid": "", "dashed": "5 3", "dashdot": "7 3 2 3", "dotted": "2 3"}


def page_of(report: Report) -> str:
    """The whole page."""
    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = made.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        report=report,
        counts={section.name: _counts(section) for section in report.sections},
        series=SERIES,
        cells=cells_of,
        numbers=numbers_of,
        looks_of=looks_of,
        swatch=_swatch,
        svgs_of=_drawings,
        zip=zip,
    )


def _counts(section: Section) -> list[tuple[str, int]]:
    """How many findings of each level a section has."""
    return sorted(Counter(finding.level for finding in section.findings).items())


def _drawings(figure: Figure) -> list[Markup]:
    # As they are: matplotlib has escaped all texts.
    return [Markup(svg) for svg in svgs_of(figure)]


def _swatch(look: Look) -> Markup:
    """A short stroke, as the series has it."""
    return Markup(
        '<svg width="24" height="8" aria-hidden="true"><line x1="1" x2="23" y1="4" y2="4" stroke="var({})" '
        'stroke-width="3" stroke-dasharray="{}"/></svg>'
    ).format(VARIABLES[look.colour], _STROKES[look.dash])
