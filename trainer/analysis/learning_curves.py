"""Learning curves from the metrics of runs, and their mean and spread over the seeds of one config.

A run's metrics.jsonl has a line for each report. A crash may have cut its last line short, a resumed run may
say a step again, and the branches of a fork pass the same steps one after another: each of these is told
apart here, and what is left out is counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.quality.ranking import Floats

METRICS = ("auc", "gauc", "logloss", "pcoc")
"""What curves there are of validations and windows; training has its loss."""


class Curve(NamedTuple):
    """Which curve a point belongs to.

    Attributes:
        split: `train`, `validation`, or `window` of a stream that is measured before it is trained.
        metric: its name; task: whose, empty = all tasks together (a loss).
        branch: of a fork, empty = of none.
    """

    split: str
    metric: str
    task: str = ""
    branch: str = ""


@dataclass(frozen=True)
class RunCurves:
    """The curves of one run.

    Attributes:
        points: curve -> step -> value; a value that is NaN is no point.
        cut_short: lines that are no JSON object with a step and a split; repeated: points that a later line
            says again, which counts.
        phases: the names of the phases that lines name, in order.
    """

    points: Mapping[Curve, Mapping[int, float]] = field(default_factory=dict)
    cut_short: int = 0
    repeated: int = 0
    phases: tuple[str, ...] = ()

    def steps(self, split: str) -> int:
        """The largest step of a split's curves, -1 without any."""
        return max((max(own) for curve, own in self.points.items() if curve.split == split), default=-1)


def read_curves(file: Path) -> RunCurves:
    """The curves in a metrics.jsonl; none where there is no such file."""
    if not file.exists():
        return RunCurves()
    lines, cut_short = [], 0
    # Lines end by a line feed alone: a name inside of one may hold other separators.
    for text in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not text.strip():
            continue
        line = _line(text)
        if line is None:
            cut_short += 1
        else:
            lines.append(line)
    return curves_of(lines, cut_short)


def _line(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    whole = (
        isinstance(line, dict) and isinstance(line.get("step"), int) and isinstance(line.get("split"), str)
    )
    return line if whole else None


def curves_of(lines: Sequence[Mapping[str, Any]], cut_short: int = 0) -> RunCurves:
    """The curves that whole lines have, in the order of the file."""
    points: dict[Curve, dict[int, float]] = {}
    repeated, phases = 0, dict[str, None]()
    for line in lines:
        if isinstance(phase := line.get("phase"), str):
            phases.setdefault(phase)
        for curve, value in _points(line):
            own = points.setdefault(curve, {})
            repeated += line["step"] in own
            own[line["step"]] = value
    in_order = {curve: dict(sorted(own.items())) for curve, own in points.items()}
    return RunCurves(in_order, cut_short, repeated, tuple(phases))


def _points(line: Mapping[str, Any]) -> Iterator[tuple[Curve, float]]:
    """The points of a line that have a value."""
    split, branch = line["split"], str(line.get("branch", ""))
    if "round" in line and branch:
        # The same branch begins anew in each round, from weights that all branches share.
        branch = f"{branch}, round {line['round']}"
    tasks = line.get("tasks")
    tasks = tasks if isinstance(tasks, dict) else {}
    if split == "train":
        yield from _number(Curve(split, "loss", branch=branch), line)
        for task, own in tasks.items() if len(tasks) > 1 else ():
            yield from _number(Curve(split, "loss", task, branch), own)
    elif split in ("validation", "window"):
        for task, own in tasks.items():
            for metric in METRICS:
                yield from _number(Curve(split, metric, task, branch), own)


def _number(curve: Curve, values: object) -> Iterator[tuple[Curve, float]]:
    value = values.get(curve.metric) if isinstance(values, dict | Mapping) else None
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield curve, float(value)


@dataclass(frozen=True)
class SeedCurve:
    """One curve of the runs of one config.

    Attributes:
        steps: ascending; mean: over the runs that have a point there; deviation: their standard deviation
            (with n - 1), NaN of one run; runs: how many they are.
    """

    steps: Floats
    mean: Floats
    deviation: Floats
    runs: Floats

    @property
    def spread(self) -> bool:
        """Whether some step has several runs."""
        return bool((self.runs > 1).any())


def over_seeds(runs: Sequence[Mapping[int, float]]) -> SeedCurve:
    """Mean and spread of a curve over runs, at the steps that most of them have.

    A step that only a minority has, because a run validated at other steps, is left out: a mean over other
    runs than beside it would jump for no reason. Where no step has a majority, every step is kept.
    """
    values: dict[int, list[float]] = {}
    for own in runs:
        for step, value in own.items():
            values.setdefault(step, []).append(value)
    most = max(map(len, values.values()), default=0)
    kept = {step: each for step, each in sorted(values.items()) if 2 * len(each) > most}
    counts = np.array([len(each) for each in kept.values()], dtype=np.float64)
    deviations = [float(np.std(each, ddof=1)) if len(each) > 1 else math.nan for each in kept.values()]
    means = [float(np.mean(each)) for each in kept.values()]
    return SeedCurve(np.array([*kept], dtype=np.float64), np.array(means), np.array(deviations), counts)


def smoothed(values: Floats, width: int) -> Floats:
    """The mean of each value and its neighbours, `width` of them at most, fewer at the ends."""
    half = max(0, (width - 1) // 2)
    total = np.r_[0.0, np.cumsum(values)]
    places = np.arange(values.size)
    # As many on either side, so that ends are not drawn to the middle.
    reach = np.minimum(half, np.minimum(places, values.size - 1 - places))
    means: Floats = (total[places + reach + 1] - total[places - reach]) / (2 * reach + 1)
    return means
