"""The sections of a report, in their order. A new one is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from embeddings.errors import ConfigError
from pipelines.analyze import collapse, curves, entanglement, gradients, quality, search, tables
from pipelines.analyze.options import AnalyzeOptions
from pipelines.analyze.report.model import Section
from pipelines.analyze.runs import AnalysedRun

Analyse = Callable[[Sequence[AnalysedRun], AnalyzeOptions], Section]

SECTIONS: Mapping[str, Analyse] = {
    "collapse": collapse.analyse,
    "entanglement": entanglement.analyse,
    "gradients": gradients.analyse,
    "search": search.analyse,
    "tables": tables.analyse,
    "quality": quality.analyse,
    "curves": curves.analyse,
}
"""By the names that `--what` takes, which are those of the sections."""


def chosen(names: Sequence[str]) -> dict[str, Analyse]:
    """The sections of these names in the order of the report; all of them where there is no name.

    Raises:
        ConfigError: there is no section of that name.
    """
    for name in names:
        if name not in SECTIONS:
            raise ConfigError(f"--what {name}: there is no such section; there are {', '.join(SECTIONS)}")
    return {name: analyse for name, analyse in SECTIONS.items() if name in names or not names}
