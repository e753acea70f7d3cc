"""The report of a benchmark: on the terminal while it measures, at its end as JSON and as a Markdown page."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.console import table_lines
from trainer.ranks.machine import cores
from trainer.run_folder import versions
from trainer.sealed_folder import write_text

Row = dict[str, Any]


class Report:
    """What one benchmark measured.

    Attributes:
        rows: the measurements. ratios: what they mean, each over a baseline of the same process.
        facts: what they were made on.

    Args:
        given: the values of the benchmark's options.
        heading: of the Markdown page. seed: of what was drawn; None: nothing was.
        n: measurements of each row; None: --repeats, where there is that option.
    """

    def __init__(
        self, given: argparse.Namespace, heading: str, *, seed: int | None = None, n: int | None = None
    ) -> None:
        self.rows: list[Row] = []
        self.ratios: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        self._given, self._seed, self._n = given, seed, n or getattr(given, "repeats", None)
        self._page = [f"# {heading}", ""]

    def line(self, text: str = "") -> None:
        """One line of text."""
        self.lines([text] if text else [])

    def lines(self, lines: Sequence[str]) -> None:
        """Lines of Markdown that belong together."""
        print("\n".join(lines), flush=True)
        # An empty line, or Markdown would join them with the next ones.
        self._page += [*lines, ""] if lines else []

    def cells(self, head: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
        """A table whose cells are texts already."""
        print("\n".join(table_lines(head, cells)), flush=True)
        self._page += [*markdown(head, cells), ""]

    def table(self, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of rows: heading -> format, such as `{"ms": "{ms:.2f}"}`. Missing keys stay empty."""
        self.cells(list(columns), [[cell_of(form, row) for form in columns.values()] for row in rows])

    def ratio(
        self, name: str, over: Sequence[float], under: Sequence[float], digits: int = 2, shown: str = ""
    ) -> None:
        """A ratio of two ways: the median of the rounds' ratios, with their lowest and highest."""
        each = [a / b for a, b in zip(over, under, strict=False)]
        self.ratios[name] = statistics.median(each)
        self.facts |= {f"{name}_min": min(each), f"{name}_max": max(each)}
        low, high = f"{min(each):.{digits}f}", f"{max(each):.{digits}f}"
        self.line(f"{shown or name}: {self.ratios[name]:.{digits}f} ({low}-{high})")

    def show_ratios(self, digits: int = 3) -> None:
        """Print the ratios that were set without `ratio`."""
        for name, value in self.ratios.items():
            self.line(f"{name}: {value:,.{digits}f}")

    def close(self) -> None:
        """Print the provenance, and write the files that --json and --page name."""
        for text in provenance(self._given.command, self._seed, self._n):
            self.line(text)
        if self._given.page is not None:
            write_text(self._given.page, "\n".join(self._page).rstrip() + "\n")
        if self._given.json is not None:
            write_text(self._given.json, json.dumps(self._tree(), indent=1))

    def _tree(self) -> dict[str, Any]:
        return {
            "ratios": self.ratios,
            "rows": self.rows,
            "facts": self.facts,
            "machine": {"platform": platform.platform(), "processor": processor(), "cores": cores()},
            "load": os.getloadavg()[0],
            "versions": versions(),
            "commit": commit(),
            "command": self._given.command,
            "seed": self._seed,
            "n": self._n,
        }


def cell_of(form: str, row: Mapping[str, Any]) -> str:
    """A cell; empty where the row has no such key."""
    try:
        return form.format_map(row)
    except KeyError:
        return ""


def markdown(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, its first column to the left and the others to the right."""
    rule = f"|---|{'--:|' * (len(head) - 1)}"
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in cells)]


def provenance(command: str, seed: int | None, n: int | None) -> list[str]:
    """Three lines: the machine and its load; versions; commit, seed, number of measurements and command."""
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    drawn = f"seed {seed}; " if seed is not None else ""
    counted = f"n = {n}; " if n is not None else ""
    return [
        f"{processor()}, {cores()} cores, load {load}, {platform.platform()}",
        "; ".join(f"{name} {version}" for name, version in versions().items()),
        f"commit {commit()}; {drawn}{counted}{command}",
    ]


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return (named or [platform.processor() or platform.machine()])[0]


def commit() -> str:
    """The commit of this checkout, with `+` if files are changed; `unknown` outside of a checkout."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
