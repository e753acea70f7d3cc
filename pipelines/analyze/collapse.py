"""Collapse: how many of its dimensions a table uses."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.analyze.options import AnalyzeOptions
from pipelines.analyze.report.model import Section
from pipelines.analyze.runs import AnalysedRun


def analyse(runs: Sequence[AnalysedRun], options: AnalyzeOptions) -> Section:
    """The spectra of all tables of all runs."""
    return Section("collapse", "Collapse", "How many of its dimensions each table uses.")
