"""The page of a report: one HTML file that needs nothing else."""

from __future__ import annotations

from html import escape

from pipelines.analyze.report.model import Report, Section


def page_of(report: Report) -> str:
    """The whole page."""
    parts = [f"<h1>{escape(report.title)}</h1>"]
    parts += [f"<p>{escape(finding.text)}</p>" for finding in report.findings]
    parts += [_section(section) for section in report.sections]
    return f'<!doctype html><meta charset="utf-8"><title>{escape(report.title)}</title>{"".join(parts)}\n'


def _section(section: Section) -> str:
    figures = "".join(f"<h3>{escape(f.title)}</h3><p>{escape(f.caption)}</p>" for f in section.figures)
    return f"<h2>{escape(section.title)}</h2><p>{escape(section.introduction)}</p>{figures}"
