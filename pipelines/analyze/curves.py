"""Learning curves: loss and validations by step, with the spread over the seeds of a config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pipelines.analyze.options import AnalyzeOptions
from pipelines.analyze.report.model import Cell, Figure, Finding, Line, Lines, Section, Table
from pipelines.analyze.runs import AnalysedRun
from trainer.analysis.learning_curves import Curve, RunCurves, SeedCurve, over_seeds, read_curves, smoothed

_TITLES = {"auc": "AUC", "gauc": "GAUC", "logloss": "logloss", "pcoc": "PCOC", "loss": "loss"}
_SPLITS = {
    "validation": ("Validation", "The validation split was measured in the middle of training."),
    "window": ("Windows", "Each window of the stream was measured before the model had trained on it."),
}
# Reports of a loss that are drawn as they are; more of them are smoothed to about so many.
_POINTS = 60
# By so much less than its best, a last validation is worth a sentence.
_FALLEN = 0.005
_INTRODUCTION = (
    "What training reported as it went on. Runs whose configs differ in the seed alone are one line: their "
    "mean, in a band of one standard deviation over the seeds to either side."
)


def analyse(runs: Sequence[AnalysedRun], options: AnalyzeOptions) -> Section:
    """Loss and validations of all runs by step."""
    curves = {run.name: read_curves(run.folder.metrics) for run in runs}
    labels: dict[str, list[RunCurves]] = {}
    for run in runs:
        labels.setdefault(run.label, []).append(curves[run.name])
    figures: list[Figure | Table] = [*_loss(labels), *_measured(labels)]
    if figures:
        figures.append(_last(labels))
    problems = tuple(text for name, each in curves.items() for text in _problems(name, each))
    findings = tuple(_fallen(labels))
    return Section("curves", "Learning curves", _INTRODUCTION, tuple(figures), findings, problems)


def _loss(labels: Mapping[str, Sequence[RunCurves]]) -> Iterator[Figure]:
    """The loss of training: of all tasks together, and of each where there are several."""
    charts = []
    for task in _tasks(labels, "train"):
        lines = tuple(_lines(labels, "train", "loss", task, smooth=True))
        if lines:
            title = f"loss of {task}" if task else "loss of training"
            charts.append(Lines(title, "step", "loss", lines))
    if charts:
        caption = (
            "The mean loss of the candidates trained since the report before, as train reports it every "
            f"train.log_every steps; of more than {_POINTS} reports a moving mean. The model changes while "
            "it is measured, and regularising terms are part of it: compare its course, and validations for "
            "quality."
        )
        yield Figure("curves_loss", "Loss of training", caption, tuple(charts))


def _measured(labels: Mapping[str, Sequence[RunCurves]]) -> Iterator[Figure]:
    """Validations and windows, a figure a task."""
    for split, (title, how) in _SPLITS.items():
        for number, task in enumerate(_tasks(labels, split), start=1):
            charts = []
            for metric in ("auc", "gauc", "logloss", "pcoc"):
                if lines := tuple(_lines(labels, split, metric, task)):
                    charts.append(Lines(_TITLES[metric], "step", _TITLES[metric], lines))
            caption = (
                f"{how} A point is one such measurement; docs/evaluation.md defines the metrics. More is "
                "better of AUC and GAUC, less of logloss; PCOC is 1 where predictions add up to the labels."
            )
            yield Figure(f"curves_{split}_{number}", f"{title}: {task}", caption, tuple(charts))


def _tasks(labels: Mapping[str, Sequence[RunCurves]], split: str) -> list[str]:
    """The tasks that any run has curves of, in their order; empty = all together."""
    curves = (curve for own in labels.values() for run in own for curve in run.points)
    return list(dict.fromkeys(curve.task for curve in curves if curve.split == split))


def _lines(
    labels: Mapping[str, Sequence[RunCurves]], split: str, metric: str, task: str, smooth: bool = False
) -> Iterator[Line]:
    """A line for each config, and for each branch of a fork."""
    for label, own in labels.items():
        branches = dict.fromkeys(
            curve.branch for run in own for curve in run.points if curve[:3] == (split, metric, task)
        )
        for branch in branches:
            curve = Curve(split, metric, task, branch)
            found = over_seeds([run.points[curve] for run in own if curve in run.points])
            yield _line(f"{label}, {branch}" if branch else label, found, smooth)


def _line(name: str, found: SeedCurve, smooth: bool) -> Line:
    mean, deviation = found.mean, np.nan_to_num(found.deviation)
    if smooth and mean.size > _POINTS:
        width = mean.size // _POINTS * 2 + 1
        mean, deviation = smoothed(mean, width), smoothed(deviation, width)
    if not found.spread:
        return Line(name, found.steps, mean)
    name = f"{name} ({int(found.runs.max())} seeds)"
    return Line(name, found.steps, mean, mean - deviation, mean + deviation)


def _last(labels: Mapping[str, Sequence[RunCurves]]) -> Table:
    """Where each curve ended, and where it was best."""
    values = ("first", "best", "best at step", "last", "last at step")
    columns = ("config", "seeds", "measured on", "task", "metric", *values)
    rows: list[tuple[Cell, ...]] = []
    for label, own in labels.items():
        for curve in dict.fromkeys(curve for run in own for curve in run.points):
            found = over_seeds([run.points[curve] for run in own if curve in run.points])
            best = _best(curve.metric, found)
            shown = (
                found.mean[0],
                found.mean[best],
                int(found.steps[best]),
                found.mean[-1],
                int(found.steps[-1]),
            )
            what = f"{curve.split} ({curve.branch})" if curve.branch else curve.split
            rows.append(
                (label, int(found.runs.max()), what, curve.task or "all", _TITLES[curve.metric], *shown)
            )
    caption = (
        "The first, the best and the last value of each curve, means over the seeds of a config. The best of "
        "many validations is best by chance, too. PCOC is best nearest to 1."
    )
    return Table("curves_last", "Where curves begin and end", caption, columns, tuple(rows))


def _best(metric: str, found: SeedCurve) -> int:
    """The place of the best value of a curve."""
    worse = {"auc": -found.mean, "gauc": -found.mean, "pcoc": np.abs(found.mean - 1)}.get(metric, found.mean)
    return int(np.argmin(worse))


def _fallen(labels: Mapping[str, Sequence[RunCurves]]) -> Iterator[Finding]:
    """Validations whose last AUC is well below the best."""
    for number, task in enumerate(_tasks(labels, "validation"), start=1):
        curve = Curve("validation", "auc", task)
        for label, own in labels.items():
            found = over_seeds([run.points[curve] for run in own if curve in run.points])
            if not found.mean.size:
                continue
            best = _best("auc", found)
            if found.mean[best] - found.mean[-1] > _FALLEN:
                best_step, last_step = int(found.steps[best]), int(found.steps[-1])
                text = (
                    f"The validation AUC of {label} ({task}) was best after step {best_step:,}, "
                    f"{found.mean[best]:.4f}, and fell to {found.mean[-1]:.4f} by step {last_step:,}: "
                    "early stopping (train.early_stopping) keeps the best"
                )
                yield Finding("notice", text, f"curves_validation_{number}")


def _problems(name: str, curves: RunCurves) -> Iterator[str]:
    """What was odd about the lines of a run, and what it lacks."""
    if curves.cut_short:
        lines = "1 line is" if curves.cut_short == 1 else f"{curves.cut_short:,} lines are"
        yield f"metrics.jsonl of {name}: {lines} cut short or no report, and left out"
    if curves.repeated:
        points = "1 point is" if curves.repeated == 1 else f"{curves.repeated:,} points are"
        yield (
            f"metrics.jsonl of {name}: {points} reported twice for one step, as by a run that went on from "
            "an older checkpoint; the later ones are drawn"
        )
    if curves.steps("train") < 0:
        yield f"{name} has no report of its training; one is written every train.log_every steps"
    elif curves.steps("validation") < 0 and curves.steps("window") < 0:
        yield f"{name} has no validation; give the log a validation split, and set train.validate_every"
