"""Gradients: which role, task and domain pulls hardest at the tables, and who pulls against whom."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from embeddings.errors import CheckpointError
from pipelines.analyze.means import mean_of_known
from pipelines.analyze.options import AnalyzeOptions
from pipelines.analyze.report.model import Figure, Finding, HeatMap, Line, Lines, Section, Table
from pipelines.analyze.runs import AnalysedRun
from trainer.analysis.gradients import Puller, Pulls, probe
from trainer.update.role_gradients import ATTENTION, REPRESENTATION

# Steps of data that a checkpoint is probed with, at most.
_PROBED = 8
# One role dominates where its norms are so many times those of the other.
_DOMINATES = 2.0
# A task dominates with a larger share of the updates.
_MOST = 0.9

_INTRODUCTION = (
    "Attention (the search and its weights) and representation (what is pooled) each have a gradient of "
    "every row of the tables that they share, and so has each task and each domain. Where one is much "
    "larger it decides where the row goes, and where two point against each other each undoes what the "
    "other does. DARE's paper (section 2) measures both in TWIN. Norms are of the loss of a whole step."
)


def analyse(runs: Sequence[AnalysedRun], options: AnalyzeOptions) -> Section:
    """What was watched while the runs were trained, and what a probe of their checkpoints says."""
    figures: list[Figure | Table] = []
    findings: list[Finding] = []
    watched = {run.name: steps for run in runs if (steps := _entries(run, "gradients"))}
    skipped = [
        f"{run.name}: gradients were not watched in training; train with train.watch_gradients = 10, say."
        for run in runs
        if run.name not in watched
    ]
    by_label: dict[str, list[AnalysedRun]] = defaultdict(list)
    for run in runs:
        by_label[run.label].append(run)
    of_labels = {
        label: [watched[run.name] for run in same if run.name in watched] for label, same in by_label.items()
    }
    of_labels = {label: entries for label, entries in of_labels.items() if entries}
    if of_labels:
        table = _table(of_labels)
        figures += [table, _norms(of_labels)]
        if any(entry["cosine"] for entries in of_labels.values() for _, entry in entries[0]):
            figures.append(_conflict(of_labels))
        findings += _findings(table)
    dominance = {run.name: steps for run in runs if (steps := _entries(run, "dominance"))}
    figures += [_dominance(dominance)] if dominance else []
    for number, (label, same) in enumerate(by_label.items(), 1):
        try:
            pulls = _probed(same[0], options)
        except CheckpointError as error:
            skipped.append(f"{label}: {error}")
            continue
        if pulls:
            figures += _of_probe(label, pulls, "" if len(by_label) == 1 else f"-{number}")
        else:
            skipped.append(f"{label}: the train split has no candidate to probe its checkpoint with.")
    return Section("gradients", "Gradients", _INTRODUCTION, tuple(figures), tuple(findings), tuple(skipped))


def _entries(run: AnalysedRun, key: str) -> list[tuple[int, Mapping[str, Any]]]:
    """Step -> what metrics.jsonl says under a key."""
    return [(int(line["step"]), line[key]) for line in run.metrics if line.get(key)]


Entries = list[tuple[int, Mapping[str, Any]]]


def _mean_norm(entries: Entries, unit: str, role: str) -> float:
    """Over watched steps; NaN where the role does not read the unit."""
    found = [
        (entry["norm"][unit][role], entry["steps"])
        for _, entry in entries
        if role in entry["norm"].get(unit, {})
    ]
    return _weighted(found)


def _weighted(found: Sequence[tuple[float, float]]) -> float:
    total = sum(weight for _, weight in found)
    return sum(value * weight for value, weight in found) / total if total else math.nan


def _table(of_labels: Mapping[str, Sequence[Entries]]) -> Table:
    rows = []
    for label, seeds in of_labels.items():
        for unit in _units(seeds):
            attention, representation = (
                mean_of_known([_mean_norm(entries, unit, role) for entries in seeds])
                for role in (ATTENTION, REPRESENTATION)
            )
            cosine, in_rows, in_steps = (
                mean_of_known([_weighted(list(_values(entries, unit, *keys))) for entries in seeds])
                for keys in (("cosine",), ("conflict", "rows"), ("conflict", "steps"))
            )
            ratio = representation / attention if attention else math.nan
            rows.append((label, unit, attention, representation, ratio, cosine, in_rows, in_steps))
    return Table(
        "gradients-by-table",
        "Gradients of the two roles while training",
        "Of each group of tables and each table: the mean over rows of the norm of a row's gradient by "
        "role, how many times larger that of representation is, and, where both roles share the table, "
        "the mean cosine of their gradients of a row, the share of rows whose cosine is negative, and the "
        "share of watched steps whose mean cosine is negative (DARE's conflict). Means over all watched "
        "steps and over seeds; rows that a role leaves alone count with norm 0, and not in cosines.",
        (
            *("config", "tables", "attention", "representation", "ratio"),
            *("cosine", "rows in conflict", "steps in conflict"),
        ),
        tuple(rows),
    )


def _units(seeds: Sequence[Entries]) -> list[str]:
    return list(dict.fromkeys(unit for entries in seeds for _, entry in entries for unit in entry["norm"]))


def _values(entries: Entries, unit: str, key: str, part: str = "") -> Iterator[tuple[float, float]]:
    """What each line says of a unit, with how many steps it is of."""
    for _, entry in entries:
        if unit in entry[key]:
            yield (entry[key][unit][part] if part else entry[key][unit]), entry["steps"]


def _line(name: str, seeds: Sequence[Mapping[int, float]]) -> Line:
    """The mean over seeds at each step that all of them have, and their range."""
    steps = sorted(set.intersection(*(set(each) for each in seeds)))
    values = np.array([[each[step] for step in steps] for each in seeds])
    band = {"low": values.min(0), "high": values.max(0)} if len(seeds) > 1 else {}
    return Line(name, steps, values.mean(0), **band)


def _groups(seeds: Sequence[Entries]) -> list[str]:
    return [unit for unit in _units(seeds) if unit.startswith("groups.")]


def _norms(of_labels: Mapping[str, Sequence[Entries]]) -> Figure:
    charts = []
    for label, seeds in of_labels.items():
        lines = []
        for unit in _groups(seeds):
            for role in (ATTENTION, REPRESENTATION):
                series = [
                    {step: e["norm"][unit][role] for step, e in entries if role in e["norm"].get(unit, {})}
                    for entries in seeds
                ]
                if all(series):
                    group = unit.removeprefix("groups.")
                    lines.append(_line(role if group == role else f"{group}, {role}", series))
        charts.append(Lines(label, "step", "mean norm of a row's gradient", tuple(lines), log_y=True))
    return Figure(
        "gradients-norms",
        "Who pulls harder",
        "The mean over rows of the norm of a row's gradient, by role, of all tables of a group; each "
        "point is the mean over the watched steps since the point before. Bands are the range over seeds. "
        "In one group that serves both roles the larger line decides where rows go.",
        tuple(charts),
    )


def _conflict(of_labels: Mapping[str, Sequence[Entries]]) -> Figure:
    rows, cosines = [], []
    for label, seeds in of_labels.items():
        for unit in _groups(seeds):
            name = f"{label}, {unit.removeprefix('groups.')}"
            shares = [
                {step: e["conflict"][unit]["rows"] for step, e in entries if unit in e["conflict"]}
                for entries in seeds
            ]
            means = [
                {step: e["cosine"][unit] for step, e in entries if unit in e["cosine"]} for entries in seeds
            ]
            if all(shares):
                rows.append(_line(name, shares))
                cosines.append(_line(name, means))
    return Figure(
        "gradients-conflict",
        "Do the two roles pull against each other",
        "Left: the share of rows for which the gradients of attention and representation point away from "
        "each other (negative cosine), of the rows that both pull at. Right: the mean cosine. Unrelated "
        "gradients have a half and 0. Bands are the range over seeds.",
        (
            Lines("rows in conflict", "step", "share of rows", tuple(rows)),
            Lines("cosine", "step", "mean cosine", tuple(cosines)),
        ),
    )


def _findings(table: Table) -> Iterator[Finding]:
    for label, unit, attention, representation, ratio, _, in_rows, in_steps in table.rows:
        shared = not math.isnan(float(attention or 0)) and not math.isnan(float(representation or 0))
        if not (str(unit).startswith("groups.") and shared and isinstance(ratio, float)):
            continue
        tables = f"{label}: {unit}"
        if ratio > _DOMINATES or ratio < 1 / _DOMINATES:
            times, winner = (ratio, REPRESENTATION) if ratio > 1 else (1 / ratio, ATTENTION)
            yield Finding(
                "notice", f"{tables}: {winner} pulls {times:.1f} times as hard as the other role", table.name
            )
        if isinstance(in_rows, float) and in_rows > 0.5:
            text = (
                f"{tables}: the roles are in conflict at {in_rows:.0%} of rows and in {in_steps:.0%} of steps"
            )
            yield Finding("notice", text, table.name)


def _dominance(of_runs: Mapping[str, Entries]) -> Figure:
    charts = []
    for name, entries in of_runs.items():
        lines = []
        for unit in dict.fromkeys(unit for _, entry in entries for unit in entry["mean"]):
            if not unit.startswith("groups."):
                continue
            for task in dict.fromkeys(task for _, e in entries for task in e["mean"].get(unit, {})):
                points = [
                    (step, e["mean"][unit][task]) for step, e in entries if task in e["mean"].get(unit, {})
                ]
                steps, shares = zip(*points, strict=True)
                lines.append(Line(f"{unit.removeprefix('groups.')}, {task}", steps, shares))
        charts.append(Lines(name, "step", "share of squared updates", tuple(lines)))
    return Figure(
        "gradients-dominance",
        "Which task moves the tables",
        "Each task's share of the squared updates of the rows of a group (AdaTask's rAU; shares of all "
        f"tasks add up to 1). A task with more than {_MOST} dominates. Known of runs with train.update = "
        "“per_task”.",
        tuple(charts),
    )


def _probed(run: AnalysedRun, options: AnalyzeOptions) -> dict[str, Pulls]:
    """What a checkpoint's losses ask of its tables."""
    reader = run.reader("train", options.sample)
    batches = [step.batch for step in islice(reader.steps(), _PROBED)]
    if not batches:
        return {}
    partial = run.model(batches)
    known = [partial.renumbered(batch).to(run.ranks.device) for batch in batches]
    return probe(partial.model.module, known, run.config.train.objective, run.config.train.mean)


def _of_probe(label: str, pulls: Mapping[str, Pulls], end: str) -> Iterator[Figure | Table]:
    maps, rows = [], []
    for group, found in pulls.items():
        pullers = sorted(found.norms)
        names = tuple(f"{each.source}, {each.role}" for each in pullers)
        if len(pullers) > 1:
            values = [[_whole(found, one, other) for other in pullers] for one in pullers]
            maps.append(HeatMap(group, "", "", names, names, values, centre=0.0))
        rows += [(group, each.source, each.role, found.norms[each]) for each in pullers]
    yield Table(
        f"gradients-probe{end}",
        f"What the checkpoint of {label} asks of its tables",
        f"Norms at the checkpoint, over at most {_PROBED} steps of the train split in eval mode: the mean "
        "over the rows of a step of the norm of a row's gradient, of the loss of each task and of the "
        "candidates of each domain (with the most candidates; the mean loss of its own), by role.",
        ("group", "task or domain", "role", "mean norm"),
        tuple(rows),
    )
    if maps:
        yield Figure(
            f"gradients-cosines{end}",
            f"Who asks for the same at the checkpoint of {label}",
            "The cosine of the gradients of all rows of a group that two of them ask for, means over the "
            "steps. Negative: what one gains the other loses. Empty: they reach no row in common.",
            tuple(maps),
        )


def _whole(found: Pulls, one: Puller, other: Puller) -> float:
    if one == other:
        return 1.0
    pair = found.pairs.get((one, other)) or found.pairs.get((other, one))
    return math.nan if pair is None else pair.whole
