"""The tables of the league: a section for each log, in it a table and paired differences for each task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from benchmarks.harness.report import Report
from benchmarks.league.draws import Model, difference, ranking
from benchmarks.models import Record, by_preset, mean
from embeddings.errors import DataError
from trainer.quality.bootstrap import Interval

COMPARED = ("auc", "gauc", "logloss")
LINES = {
    "own_count": "own count",
    "label_rate": "label rate",
    "history_free": "history-free",
    "tree": "tree",
}
"""The lines to beat, by the names of their runs -> as headings."""
INTRODUCTION = """
Every preset beside every other, on whole passes over each log. A row is the mean and the standard deviation
over seeds; *passes* are those over the training split. The rates are those of the preset (`own`, see
[rates.md](rates.md)) or chosen for the log by `tandemrec tune` on the validation split (`tuned`). *search*:
the width of the vectors that stage one compares, and K. *weights*: dense ones + those of tables. *samples /
CPU s*: of training.

Four lines are there to be beaten. *own count*: how often the user's past holds the candidate's finest
category (its item where there is none), without any training. *label rate*: the mean labels of the user and
of the item in the training split. *history-free*: a model of the candidate's features alone. *tree*:
gradient-boosted trees on three counts for each level ([tree.md](tree.md)), settings chosen by validation.
The columns *over ...* are differences of AUC with their 95 % intervals, paired by user over the same
candidates: a bootstrap over users and seeds at once (`benchmarks/league/draws.py`). Nothing is called better
unless the interval of the difference excludes 0. Where there is one seed, the interval is of users alone. One
in twenty such intervals excludes 0 by chance.

Each run scores the test split once, after its last step; nothing is chosen by it.
"""


@dataclass(frozen=True)
class Section:
    """What was run on a log.

    Attributes:
        records: of all runs; models: task -> models; tuned: presets whose rates were tuned for the log.
        candidates: of the training split. adapted: preset -> overrides with which it ran here.
        left_out: preset -> why it was not run.
    """

    title: str
    records: Sequence[Record]
    models: Mapping[str, Sequence[Model]]
    tuned: frozenset[str]
    candidates: int
    adapted: Mapping[str, Sequence[str]]
    left_out: Mapping[str, str]


def show_section(report: Report, section: Section, pairs: Sequence[tuple[str, str]]) -> None:
    """The section of a log."""
    report.lines([f"## {section.title}"])
    for task, models in section.models.items():
        if len(section.models) > 1:
            report.lines([f"### {task}"])
        ranked = ranking(models)
        _table(report, section, task, ranked)
        _differences(report, ranked, pairs)
    often = [record["name"] for record in section.records if record["extra"]["opened"] > 1]
    count = len(section.records)
    once = f"The test split was scored by {count} runs, by each once."
    again = f"The test split was scored by {count} runs, more than once by those that were killed meanwhile: "
    report.line(again + ", ".join(often) if often else once)
    for preset, overrides in section.adapted.items():
        report.line(f"`{preset}` runs here with {', '.join(f'`{each}`' for each in overrides)}.")
    for preset, why in section.left_out.items():
        report.line(f"`{preset}` is left out: {why}")


def _table(report: Report, section: Section, task: str, ranked: Sequence[Model]) -> None:
    by_name = {model.name: model for model in ranked}
    lines = {name: by_name[name] for name in LINES if name in by_name}
    head = ["model", "rates", "search", "weights", "seeds", "passes", "validation AUC", "test AUC", "GAUC"]
    head += ["logloss", "PCOC", "samples / CPU s", *(f"over {LINES[name]}" for name in lines)]
    of_preset, cells = dict(by_preset(section.records)), []
    for model in ranked:
        own = of_preset[model.name]
        row = [LINES.get(model.name, f"`{model.name}`")]
        row += _facts(section, own, model)
        row += [_metric(own, task, *each) for each in (("validation", "auc"), ("test", "auc"))]
        row += [_metric(own, task, "test", name) for name in ("gauc", "logloss")]
        row.append(_metric(own, task, "test", "pcoc", 3))
        trained = [each for each in own if each["samples"]]
        speed = [each["samples"] / max(each["cpu_s"], 1e-9) for each in trained]
        row.append(f"{fmean(speed):,.0f}" if speed else "-")
        row += ["" if model is line else _shown(_safely(model, line, "auc")) for line in lines.values()]
        cells.append(row)
    report.cells(head, cells)


def _facts(section: Section, records: Sequence[Record], model: Model) -> list[str]:
    """rates, search, weights, seeds, passes."""
    extra = records[0]["extra"]
    weights = f"{extra['dense']:,} + {extra['rows']:,}" if extra["rows"] else "-"
    samples = fmean(record["samples"] for record in records)
    passes = f"{samples / section.candidates:.2f}" if samples and section.candidates else "-"
    rates = "" if not extra["search"] else "tuned" if model.name in section.tuned else "own"
    return [rates, extra["search"] or "-", weights, str(len(records)) if model.seeded else "-", passes]


def _metric(records: Sequence[Record], task: str, split: str, name: str, digits: int = 4) -> str:
    values = [record[split]["tasks"][task][name] for record in records]
    return mean([math.nan if value is None else value for value in values], digits)


def _differences(report: Report, ranked: Sequence[Model], pairs: Sequence[tuple[str, str]]) -> None:
    """Neighbors in rank, then the pairs of the list."""
    by_name = {model.name: model for model in ranked}
    asked = [pair for pair in pairs if set(pair) <= by_name.keys()]
    neighbors = [(a.name, b.name) for a, b in pairwise(ranked)]
    for told, of in (("Neighbors in rank", neighbors), ("Pairs that claims are about", asked)):
        if not of:
            continue
        rows = []
        for first, second in of:
            found = {name: _safely(by_name[first], by_name[second], name) for name in COMPARED}
            rows.append([f"`{first}` - `{second}`", *map(_shown, found.values()), verdict(found["auc"])])
        report.lines([f"{told}:"])
        report.cells(["difference", "AUC", "GAUC", "logloss", "by AUC"], rows)


def verdict(found: Interval | str) -> str:
    """Which one is better, in a word; nothing is where the interval holds 0."""
    if isinstance(found, str):
        return found
    if not found.excludes(0.0):
        return "not told apart"
    return "the first is better" if found.value > 0 else "the second is better"


def _safely(one: Model, other: Model, metric: str) -> Interval | str:
    try:
        return difference(one, other, metric)
    except DataError as error:
        return str(error)


def _shown(found: Interval | str) -> str:
    if isinstance(found, str) or math.isnan(found.value):
        return "-"
    if math.isnan(found.low):
        return f"{found.value:+.4f}"
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def progress_of(records: Sequence[Record], jobs: int) -> str:
    """How much of what is asked for was run."""
    return "" if len(records) == jobs else f"Not complete: {len(records)} of {jobs} runs are done."
