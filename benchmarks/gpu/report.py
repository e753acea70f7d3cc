"""From results.jsonl to a page of tables, benchmarks/gpu/RESULTS-<device>.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.catalogue import STEPS
from benchmarks.gpu.runner import cell_text, quiet

Line = Mapping[str, Any]


def write_page(out: Path, to: Path) -> Path:
    """Write the page about `<out>/results.jsonl` into a folder; -> the page.

    Of a step that was run several times the newest line counts. A dry run measures nothing: its page stays
    in `out`, and beside a real run in the same folder it is left out.

    Raises:
        FileNotFoundError: the folder has no results.
    """
    told = _by_run((out / "results.jsonl").read_text(encoding="utf-8"))
    dry = all(run["dry"] for run, _ in told)
    told = [(run, lines) for run, lines in told if run["dry"] == dry]
    runs = [run for run, _ in told]
    steps = {line["step"]: {**line, **_elsewhere(run, runs[-1])} for run, lines in told for line in lines}
    path = (out if dry else to) / f"RESULTS-{'dry' if dry else name_of(runs[-1]['device'])}.md"
    path.write_text("\n".join(page(runs, steps)) + "\n", encoding="utf-8")
    return path


def _by_run(text: str) -> list[tuple[Line, list[Line]]]:
    """What each run says of itself, and the lines of its steps."""
    told: list[tuple[Line, list[Line]]] = []
    for line in map(json.loads, text.splitlines()):
        if "run" in line:
            told.append((line["run"], []))
        else:
            told[-1][1].append(line)
    return told


def _elsewhere(run: Line, newest: Line) -> Line:
    """Of which commit or device an answer is, where the page's head names another."""
    differ = [str(run[key]) for key in ("commit", "device") if run[key] != newest[key]]
    return {"of": ", ".join(differ)} if differ else {}


def name_of(device: str) -> str:
    """`NVIDIA H100 80GB HBM3, 81559 MiB, 570.1` -> `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", device.split(",", maxsplit=1)[0].lower()).strip("-")


def page(runs: Sequence[Line], steps: Mapping[str, Line]) -> list[str]:
    """The page's lines."""
    newest = runs[-1]
    lines = [f"# The check on {newest['device'].split(',')[0]}", ""]
    if newest["dry"]:
        lines += ["**A dry run: sizes are tiny and no number here is a measurement.**", ""]
    lines += _about(runs)
    lines += ["", "| step | state | seconds | what it found |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {_state(line)} | {line['seconds']:.1f} | {_found(line)} |"
        for name, line in _in_order(steps)
    ]
    for name, line in _in_order(steps):
        if line.get("rows") or line.get("facts"):
            lines += ["", *_section(name, line)]
    return lines


def _about(runs: Sequence[Line]) -> list[str]:
    newest = runs[-1]
    versions = ", ".join(f"{name} {version}" for name, version in newest["versions"].items())
    changed = " (with changes that are not committed)" if newest["changed"] else ""
    return [
        f"* device: {newest['device']}",
        f"* versions: {versions}",
        f"* commit: {newest['commit']}{changed}",
        *(f"* {run['date']}: `{run['command']}`" for run in runs),
    ]


def _in_order(steps: Mapping[str, Line]) -> list[tuple[str, Line]]:
    return [(name, steps[name]) for name in STEPS if name in steps]


def _state(line: Line) -> str:
    if "skipped" in line:
        return "skipped"
    if not line["ok"]:
        return "**failed**"
    return "**different**" if line.get("different") else "ok"


def _found(line: Line) -> str:
    found = line.get("skipped") or line.get("error") or ", ".join(line.get("different", []))
    older = f"(of {line['of']}) " if "of" in line else ""
    return _cell(f"{older}{found or ''}".strip())


def _section(name: str, line: Line) -> list[str]:
    try:
        with quiet():
            question, expected = STEPS[name].docs()
    except ImportError:
        question = expected = ""
    lines = [f"## {name}", ""]
    lines += [question, ""] if question else []
    lines += [f"Expected: {expected}", ""] if expected else []
    facts = line.get("facts", {})
    lines += [f"* {key}: {_cell(cell_text(value))}" for key, value in facts.items()]
    rows = line.get("rows", [])
    if rows:
        lines += [""] if facts else []
        lines += table(rows)
    return lines


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows as Markdown; a key that some rows lack is an empty cell."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return [
        *head,
        *(f"| {' | '.join(_cell(cell_text(row.get(key, ''))) for key in columns)} |" for row in rows),
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
