"""Writes a report: one page, and for each figure its picture and its numbers.

    DIR/index.html                the page; it needs nothing else to be read
    DIR/figures/NAME.png, .json   each figure, and each table as JSON
    DIR/report.json               findings, sections, runs, versions

The folder appears whole or not at all.
"""

from __future__ import annotations

import json
from pathlib import Path

from embeddings.errors import ConfigError
from pipelines.analyze.report.draw import write_png
from pipelines.analyze.report.model import Figure, Report
from pipelines.analyze.report.numbers import json_of, plain
from pipelines.analyze.report.page import page_of
from trainer.sealed_folder import naming, publish, remove_folder, scratch
from trainer.storage import is_remote

PAGE, FACTS, FIGURES = "index.html", "report.json", "figures"
FORMAT = "tandemrec.report"


def check_target(out: Path) -> None:
    """Raises:
    ConfigError: there is something at `out` that is no report, or it is in a store.
    """
    if is_remote(out):
        raise ConfigError(f"--out {out}: a report is written to a folder of this machine; name one")
    if out.is_dir() and (_is_report(out / FACTS) or not any(out.iterdir())):
        return
    if out.exists():
        raise ConfigError(f"--out {out}: is there and is no report; name a folder that is not there yet")


def write_report(report: Report, out: Path) -> Path:
    """Write a report to `out`, in the place of an older one -> the page.

    Raises:
        ConfigError: there is something else at `out`, or it cannot be written.
    """
    check_target(out)
    out = out.resolve()
    try:
        with scratch(out.parent, out.name) as part, naming(out):
            _fill(part, report)
            check_target(out)
            older = part.with_name(f"{part.name}.old")
            publish(part, out, aside=older)
            if older.exists():
                remove_folder(older)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror or error}") from None
    return out / PAGE


def _fill(part: Path, report: Report) -> None:
    figures = part / FIGURES
    figures.mkdir()
    for figure in report.figures():
        (figures / f"{figure.name}.json").write_text(json_of(figure), encoding="utf-8")
        if isinstance(figure, Figure):
            write_png(figure, figures / f"{figure.name}.png")
    (part / PAGE).write_text(page_of(report), encoding="utf-8")
    facts = {
        "format": FORMAT,
        "version": 1,
        "title": report.title,
        "facts": dict(report.facts),
        "findings": [plain(finding) for finding in report.findings],
        "sections": [
            {
                "name": section.name,
                "title": section.title,
                "figures": [figure.name for figure in section.figures],
                "skipped": list(section.skipped),
            }
            for section in report.sections
        ],
    }
    (part / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _is_report(file: Path) -> bool:
    try:
        return bool(json.loads(file.read_text(encoding="utf-8"))["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False
