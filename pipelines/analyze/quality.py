"""Quality with its uncertainty: metrics by slice, calibration curves, and configs compared in pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, islice

import numpy as np

from embeddings.errors import TandemError
from pipelines.analyze.options import AnalyzeOptions
from pipelines.analyze.quality_study import WHOLE, Part, Study, study
from pipelines.analyze.report.model import (
    Cell,
    Figure,
    Finding,
    Interval,
    Intervals,
    Line,
    Lines,
    Section,
    Table,
)
from pipelines.analyze.runs import AnalysedRun
from pipelines.analyze.scores import RunScores, scores_of
from pipelines.analyze.steps import steps_apart
from trainer.analysis.slices import COMPARED, Comparison, Measured, Slicing, over_runs
from trainer.quality.bootstrap import METRICS
from trainer.quality.bootstrap import Interval as Joint
from trainer.quality.metrics import calibration

_TITLES = {"auc": "AUC", "gauc": "GAUC", "logloss": "logloss", "pcoc": "PCOC"}
_OF_SLICES = ("auc", "logloss", "pcoc")
# PCOC outside of this, and for certain not 1, is an alarm (docs/evaluation.md).
_CALIBRATED = (0.8, 1.25)
# A run that has scored less of what all runs have scored together should be evaluated.
_ENOUGH = 0.9
# Slices that are named, of a task and config.
_MOST_SLICES = 3
# Of more configs each is compared with the first one only.
_ALL_PAIRS = 4
_INTRODUCTION = (
    "How good the scores are, of which candidates, and how sure that is. Intervals are those of 95 % by a "
    "bootstrap over users: users are drawn with replacement {replicates:,} times, a user drawn twice counts "
    "twice, and the interval goes from the 2.5th to the 97.5th percentile. All runs and slices have the same "
    "draws. An interval says what other users would change, not what another training would: train several "
    "seeds for that. Measured here: {sources}."
)


def analyse(runs: Sequence[AnalysedRun], options: AnalyzeOptions) -> Section:
    """Metrics with intervals of all runs, by slice, and compared."""
    scores, skipped = list[RunScores](), list[str]()
    for run in runs:
        try:
            scores.append(scores_of(run, options.split, options.sample))
        except TandemError as error:
            skipped.append(f"{run.name}: {error}")
    by_log: dict[str, list[RunScores]] = {}
    for each in scores:
        by_log.setdefault(str(each.run.config.data.log), []).append(each)
    if len(by_log) > 1:
        skipped.append(
            "runs of different logs are not compared with each other: they have no candidates in common"
        )
    figures, findings, sources, replicates = list[Figure | Table](), list[Finding](), list[str](), 0
    for number, of_log in enumerate(by_log.values(), start=1):
        seed = of_log[0].run.config.train.seed if options.seed is None else options.seed
        try:
            found = study(of_log, seed)
        except TandemError as error:
            skipped.append(str(error))
            continue
        suffix = f"_{number}" if len(by_log) > 1 else ""
        replicates = found.draws.replicates
        sources += [f"{each.source} ({each.run.name})" for each in of_log]
        skipped += [*found.skipped, *_left_out(found, of_log)]
        figures += [*_whole(found, suffix), *_differences(found, suffix), *_slices(found, suffix)]
        figures += _calibration(found, suffix)
        findings += [*_alarms(found, suffix), *_sentences(found, suffix)]
    introduction = _INTRODUCTION.format(replicates=replicates, sources="; ".join(sources) or "nothing")
    return Section(
        "quality", "Quality by slice", introduction, tuple(figures), tuple(findings), tuple(skipped)
    )


def _left_out(found: Study, scores: Sequence[RunScores]) -> Iterator[str]:
    """What was not measured, because not all runs have it, or it means something else in each.

    Args:
        scores: of the runs, all that they have.
    """
    own = found.scores[0].scored.size
    if own < found.of:
        text = f"{found.of - own:,} of {found.of:,} candidates that not all runs have scored are left out"
        few = [each.run.name for each in scores if each.scored.size < _ENOUGH * found.of]
        if few:
            text += f"; run `tandemrec evaluate` on {' and '.join(few)} for narrower intervals"
        yield text
    for task in found.tasks:
        if not found.comparable(task):
            yield f"{task} is not compared: the runs have different labels of it"


def _of_label(found: Study, task: str, part: Part) -> Iterator[tuple[str, list[Measured]]]:
    """The configs that have measured a part of a task."""
    for label in found.labels:
        if own := found.found.get((label, task), {}).get(part):
            yield label, own


def _interval(name: str, metric: str, own: Sequence[Measured], label: str) -> Interval:
    joint = over_runs(metric, own)
    return Interval(name, joint.value, joint.low, joint.high, series=label)


def _whole(found: Study, suffix: str) -> Iterator[Figure | Table]:
    """All candidates: a figure with a chart a metric, and the table of its numbers by run."""
    several = len(found.tasks) > 1
    charts = []
    for metric in METRICS:
        rows = tuple(
            _interval(f"{label}, {task}" if several else label, metric, own, label)
            for task in found.tasks
            for label, own in _of_label(found, task, WHOLE)
        )
        charts.append(Intervals(_TITLES[metric], _TITLES[metric], rows, 1.0 if metric == "pcoc" else None))
    caption = (
        "Metrics of all candidates with their 95 % intervals; of several seeds of a config the mean. "
        "Intervals of two configs may overlap although one is better for certain, since both are measured "
        "on the same users: the figure of differences tells that."
    )
    yield Figure(f"quality_whole{suffix}", "All candidates", caption, tuple(charts))
    table = tuple(
        (each.run.name, task, *_numbers(found.found[each.run.label, task][WHOLE][_seed(found, each)]))
        for each in found.scores
        for task in each.scored.tasks
    )
    caption = "Each run with its counts. docs/evaluation.md defines the metrics."
    yield Table(f"quality_runs{suffix}", "Runs", caption, ("run", "task", *_COLUMNS), table)


_COLUMNS = (
    *("candidates", "positives", "users"),
    *(f"{_TITLES[metric]}{end}" for metric in METRICS for end in ("", " from", " to")),
    "replicates without AUC",
)


def _numbers(own: Measured) -> tuple[Cell, ...]:
    """The cells of `_COLUMNS`."""
    counts = (own.metrics.samples, own.metrics.positives, own.users)
    each = [own.intervals[metric] for metric in METRICS]
    return (*counts, *(cell for it in each for cell in (it.value, it.low, it.high)), each[0].left_out)


def _seed(found: Study, wanted: RunScores) -> int:
    """Which of the runs of its label a run is."""
    alike = [each.run.name for each in found.scores if each.run.label == wanted.run.label]
    return alike.index(wanted.run.name)


def _pairs(labels: Sequence[str]) -> list[tuple[str, str]]:
    if len(labels) > _ALL_PAIRS:
        return [(labels[0], other) for other in labels[1:]]
    return list(combinations(labels, 2))


def _comparisons(found: Study) -> Iterator[tuple[str, Comparison]]:
    """Every task and pair of configs by every metric."""
    for task in filter(found.comparable, found.tasks):
        own = dict(_of_label(found, task, WHOLE))
        for first, second in _pairs([*own]):
            for metric in COMPARED:
                yield task, Comparison.of(metric, first, own[first], second, own[second])


def _differences(found: Study, suffix: str) -> Iterator[Figure | Table]:
    """How configs differ, in pairs."""
    compared = list(_comparisons(found))
    if not compared:
        return
    charts, several = [], len(found.tasks) > 1
    for metric in COMPARED:
        rows = []
        for task, each in compared:
            if each.metric == metric:
                name = f"{each.first} - {each.second}" + (f", {task}" if several else "")
                values = each.difference
                rows.append(Interval(name, values.value, values.low, values.high))
        title = f"difference of {_TITLES[metric]}"
        charts.append(Intervals(title, title, tuple(rows), reference=0.0))
    caption = (
        "The first config less the second, on the same candidates and the same draws of users, so that what "
        "is hard for both cancels out. Where an interval holds 0, no difference can be told. More is better "
        "of AUC and GAUC, less of logloss. Of several seeds the mean is compared; the interval does not "
        "hold what other seeds would change."
    )
    yield Figure(f"quality_differences{suffix}", "Configs compared", caption, tuple(charts))
    table = list[tuple[Cell, ...]]()
    for task, each in compared:
        values = each.difference
        numbers = (values.value, values.low, values.high)
        table.append((task, each.first, each.second, _TITLES[each.metric], *numbers, each.sentence()))
    columns = ("task", "first", "second", "metric", "difference", "from", "to", "in words")
    caption = "The same as numbers and sentences."
    yield Table(f"quality_comparisons{suffix}", "Configs compared, in words", caption, columns, tuple(table))


def _slices(found: Study, suffix: str) -> Iterator[Figure | Table]:
    """A figure for each slicing and task, and one table of everything."""
    rows: list[tuple[Cell, ...]] = []
    for slicing in found.slicings:
        for place, task in enumerate(found.tasks):
            of_task = f"_{place + 1}" if len(found.tasks) > 1 else ""
            name = f"quality_by_{slicing.name}{of_task}{suffix}"
            charts = tuple(chart for metric in _OF_SLICES if (chart := _chart(found, slicing, task, metric)))
            if charts:
                caption = _SLICED.format(slicing.title) + _rates(found, slicing, task)
                yield Figure(name, f"{task} by {slicing.title}", caption, charts)
            for number, part in enumerate(slicing.parts):
                for label, own in _of_label(found, task, (slicing.name, number)):
                    rows += [(slicing.title, part, task, label, *_numbers(each)) for each in own]
    caption = "Everything that the figures of slices show, a row for each run."
    columns = ("slices by", "slice", "task", "config", *_COLUMNS)
    yield Table(f"quality_slices{suffix}", "All slices", caption, columns, tuple(rows))


_SLICED = (
    "Candidates are divided by: {}. Each slice is measured by itself, so that AUC compares candidates of one "
    "slice only and may be lower in every slice than in all of them together. A slice without an interval "
    "has a single user or one class only. PCOC is 1 where predictions add up to the labels."
)


def _rates(found: Study, slicing: Slicing, task: str) -> str:
    """A sentence: how often the label is positive in each part, since slices may be sampled differently.

    Empty where runs have different labels.
    """
    if not found.comparable(task):
        return ""
    rates = []
    for number, part in enumerate(slicing.parts):
        for _, own in islice(_of_label(found, task, (slicing.name, number)), 1):
            rates.append(f"{part}: {_rate(own):.1%}")
    _, whole = next(_of_label(found, task, WHOLE))
    return f" Positive are {_rate(whole):.1%} of all candidates; {', '.join(rates)}."


def _chart(found: Study, slicing: Slicing, task: str, metric: str) -> Intervals | None:
    """One metric of all parts of a slicing; None where no part has a value."""
    rows = []
    for number, part in enumerate(slicing.parts):
        for label, own in _of_label(found, task, (slicing.name, number)):
            name = f"{part}, {label}" if len(found.labels) > 1 else part
            row = _interval(name, metric, own, label)
            if not math.isnan(row.value):
                rows.append(row)
    reference = 1.0 if metric == "pcoc" else None
    return Intervals(_TITLES[metric], _TITLES[metric], tuple(rows), reference) if rows else None


def _calibration(found: Study, suffix: str) -> Iterator[Figure]:
    """Predictions against labels, a chart a task."""
    charts = []
    for task in found.tasks:
        lines, ends = [], list[float]()
        for label in found.labels:
            if bins := found.curves.get((label, task)):
                x, rates = [each.prediction for each in bins], [each.rate for each in bins]
                y, low, high = ([getattr(r, end) for r in rates] for end in ("value", "low", "high"))
                lines.append(Line(label, x, y, low, high))
                ends += [*x, *y]
        if lines:
            straight = Line("calibrated", [min(ends), max(ends)], [min(ends), max(ends)], dashed=True)
            title = f"calibration of {task}"
            charts.append(Lines(title, "mean prediction", "mean label", (*lines, straight)))
    if charts:
        caption = (
            "Candidates in ten equally full bins of ascending prediction: the mean label of a bin against "
            "its mean prediction, with 95 % intervals. Above the dashed line predictions are too low, below "
            "it too high. Of several seeds the first is drawn."
        )
        yield Figure(f"quality_calibration{suffix}", "Calibration", caption, tuple(charts), ("calibrated",))


def _alarms(found: Study, suffix: str) -> Iterator[Finding]:
    """Scores that are no better than chance, and predictions that are off in scale."""
    for task in found.tasks:
        for label, own in _of_label(found, task, WHOLE):
            auc, pcoc = over_runs("auc", own), over_runs("pcoc", own)
            if auc.low <= 0.5:
                value = f"AUC {auc.value:.4f} [{auc.low:.4f}, {auc.high:.4f}]"
                wrong, order = auc.high < 0.5, f"the order that {label} gives candidates by {task}"
                text = f"{value}: {order} {'is worse than' if wrong else 'cannot be told from'} chance"
                yield Finding("alarm" if wrong else "notice", text, f"quality_whole{suffix}")
            if _off(pcoc):
                text = (
                    f"The predictions of {task} by {label} add up to {pcoc.value:.2f} "
                    f"[{pcoc.low:.2f}, {pcoc.high:.2f}] times the labels"
                )
                weighted = _weighted_pcoc(found, task, label)
                if fits := _CALIBRATED[0] <= weighted <= _CALIBRATED[1]:
                    # What the loss asks for: weights are not to be predicted.
                    text += f"; with the weights of the loss, {weighted:.2f} times"
                yield Finding("notice" if fits else "alarm", text, f"quality_calibration{suffix}")
            else:
                yield from _slices_off(found, task, label, suffix)


def _weighted_pcoc(found: Study, task: str, label: str) -> float:
    """PCOC with the weights of the loss, the mean of the runs; NaN without weights."""
    values = []
    for scored in (each.scored for each in found.scores if each.run.label == label):
        if scored.weight is None:
            return math.nan
        place = scored.tasks.index(task)
        known = ~np.isnan(scored.label[:, place])
        weight = scored.weight[known, place].astype(np.float64)
        predicted, labels = (weight @ each[known, place] for each in (scored.score, scored.label))
        values.append(calibration(float(predicted), float(labels)))
    return float(np.mean(values))


def _off(pcoc: Joint) -> bool:
    """Whether predictions are out of scale for certain."""
    low, high = _CALIBRATED
    return not low <= pcoc.value <= high and pcoc.excludes(1)


def _slices_off(found: Study, task: str, label: str, suffix: str) -> Iterator[Finding]:
    """The slices of a model that is calibrated on the whole, and not in them; the farthest off first."""
    off = []
    for slicing in found.slicings:
        for number, part in enumerate(slicing.parts):
            own = found.found[label, task].get((slicing.name, number))
            if own and _off(pcoc := over_runs("pcoc", own)):
                off.append((abs(math.log(max(pcoc.value, 1e-9))), slicing, part, pcoc, _rate(own)))
    off.sort(key=lambda each: -each[0])
    usual = _rate(found.found[label, task][WHOLE])
    for _, slicing, part, pcoc, rate in off[:_MOST_SLICES]:
        of_task = f"_{found.tasks.index(task) + 1}" if len(found.tasks) > 1 else ""
        text = (
            f"{slicing.title}, {part}: the predictions of {task} by {label} add up to "
            f"{pcoc.value:.2f} [{pcoc.low:.2f}, {pcoc.high:.2f}] times the labels; positive are "
            f"{rate:.1%} of these candidates and {usual:.1%} of all"
        )
        yield Finding("notice", text, f"quality_by_{slicing.name}{of_task}{suffix}")


def _rate(own: Sequence[Measured]) -> float:
    """The share of candidates whose label is positive; all runs have the same ones."""
    return own[0].metrics.positives / max(1, own[0].metrics.samples)


def _sentences(found: Study, suffix: str) -> Iterator[Finding]:
    """Which config is better, by AUC, or by logloss where AUC has no value."""
    several = len(found.tasks) > 1
    for task, each in _comparisons(found):
        if each.metric == "auc" and not math.isnan(each.difference.value):
            text = each.sentence() + (f" ({task})" if several else "")
            text += steps_apart({label: found.steps(label) for label in (each.first, each.second)})
            yield Finding("notice", text, f"quality_differences{suffix}", compares=True)
