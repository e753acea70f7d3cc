"""What a study has found, in files and on the console."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from pipelines.console import table_lines
from pipelines.tune.best import best_toml
from pipelines.tune.plan import StudyPlan
from pipelines.tune.study import SharedStudy, steps_of
from trainer.run_folder import jsonable
from trainer.sealed_folder import remove_folder, write_text

_WORDS = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
# Of so many trials and parameters an order of importance says anything at all.
FEWEST_TRIALS, _FEWEST_PARAMETERS = 8, 2
_SHOWN = 10


@dataclass(frozen=True)
class TrialRow:
    """A trial as tables have it.

    Attributes:
        state: complete, pruned, failed or open (it runs, or its worker has died).
        value: of a complete trial; last: its newest validation, or None.
        parameters: name -> value; steps, cpu_s: trained; starts: of workers; reason: why it failed.
        validations: step -> metric.
    """

    trial: int
    state: str
    value: float | None
    last: float | None
    parameters: dict[str, Any]
    steps: int
    cpu_s: float
    starts: int
    reason: str
    validations: dict[int, float]

    @staticmethod
    def of(trial: FrozenTrial, plan: StudyPlan) -> TrialRow:
        own, seen = trial.user_attrs, trial.intermediate_values
        complete = trial.state.name == "COMPLETE"
        values = {
            each.name: each.value_of(trial.params[each.name])
            for each in plan.parameters
            if each.name in trial.params
        }
        return TrialRow(
            trial.number,
            _WORDS.get(trial.state.name, "open"),
            trial.value if complete else None,
            seen[max(seen)] if seen else None,
            values,
            steps_of(trial),
            own.get("cpu_s", 0.0),
            own.get("starts", 0),
            own.get("reason", ""),
            seen,
        )


@dataclass(frozen=True)
class Findings:
    """What can be said of a study.

    Attributes:
        rows: of all trials, in their order; best: the complete trial with the best value, the first of some.
        default: the trial of the configuration as it is, where that is complete.
        importance: parameter -> its share in how values differ (Optuna's PED-ANOVA); empty of few trials.
        missing: how many complete trials it lacks.
    """

    plan: StudyPlan
    rows: tuple[TrialRow, ...]
    best: TrialRow | None
    default: TrialRow | None
    importance: dict[str, float]
    missing: int = 0

    @staticmethod
    def of(shared: SharedStudy) -> Findings:
        plan = shared.plan
        rows = tuple(TrialRow.of(trial, plan) for trial in shared.trials)
        sign = 1 if plan.lower_is_better else -1
        complete = [row for row in rows if row.value is not None]
        best = min(complete, key=lambda row: sign * (row.value or 0.0), default=None)
        first = complete[0] if complete and complete[0].trial == 0 and not plan.outside else None
        varied = [each.name for each in plan.parameters]
        importance: dict[str, float] = {}
        several = len(varied) >= _FEWEST_PARAMETERS
        missing = max(0, FEWEST_TRIALS - len(complete)) if several else 0
        if several and not missing:
            importance = dict(optuna.importance.get_param_importances(shared.study, params=varied))
        return Findings(plan, rows, best, first, importance, missing)

    @property
    def lead(self) -> float:
        """By how much the best trial is better than the configuration as it is; NaN if nobody knows."""
        if self.best is None or self.default is None:
            return math.nan
        sign = -1 if self.plan.lower_is_better else 1
        return sign * ((self.best.value or 0.0) - (self.default.value or 0.0))

    @property
    def counts(self) -> dict[str, int]:
        """State -> trials."""
        return dict(Counter(row.state for row in self.rows))

    @property
    def trials(self) -> int:
        """The number of trials; a study may have begun more of them than it is to have now."""
        return max(self.plan.trials, len(self.rows))

    def words(self) -> list[str]:
        """What the study says of its best trial, or why it says nothing."""
        of = ", ".join(f"{count} {state}" for state, count in sorted(self.counts.items()))
        metric = self.plan.settings.metric
        if self.best is None:
            return [f"no trial of {self.trials} is complete ({of or 'none was begun'})"]
        head = f"trial {self.best.trial} of {self.trials} ({of}): validation {metric} {self.best.value:.5f}"
        if self.default is None:
            unknown = "the configuration as it is has no value here, so that no lead is known"
            return [head, unknown, *self._ends()]
        own = f"the configuration as it is (trial {self.default.trial}): {self.default.value:.5f}"
        if self.best.trial == self.default.trial:
            others = self.counts.get("complete", 0) - 1
            than = (
                "no other trial is complete" if not others else f"none of {others} other trial(s) was better"
            )
            return [head, f"this is the configuration as it is: {than}", *self._ends()]
        lead = f"{own}, a lead of {self.lead:.5f} on the split that chose it, with one seed"
        return [head, lead, *self._ends()]

    def _ends(self) -> list[str]:
        """Which values of the best trial lie at an end of their range, in a line each."""
        assert self.best is not None
        found = []
        for each in self.plan.parameters:
            if each.name in self.best.parameters and (end := each.end_at(self.best.parameters[each.name])):
                value = value_text(self.best.parameters, each.name)
                found.append(
                    f"{each.name} = {value} lies at the {end} end of its range ({each.range}): "
                    "a wider range may hold a better value"
                )
        return found


def write_findings(shared: SharedStudy) -> Findings:
    """Write the tables and the best configuration, and make room; the worker is alone meanwhile."""
    found, folder = Findings.of(shared), shared.folder
    lines = [json.dumps(jsonable(asdict(row)), ensure_ascii=False) for row in found.rows]
    write_text(folder / "trials.jsonl", "".join(f"{line}\n" for line in lines))
    summary = {
        "metric": found.plan.settings.metric,
        "task": found.plan.settings.task,
        "direction": "minimize" if found.plan.lower_is_better else "maximize",
        "trials": found.trials,
        "states": found.counts,
        "best": found.best and asdict(found.best),
        "default": found.default and asdict(found.default),
        "lead": found.lead,
        "importance": found.importance,
        "cpu_s": sum(row.cpu_s for row in found.rows),
    }
    write_text(folder / "study.json", json.dumps(jsonable(summary), indent=1, ensure_ascii=False) + "\n")
    if found.best is not None:
        drawn = shared.trials[found.best.trial].params
        words = [f"Written by `tandemrec tune` in {folder.name}.", *found.words()]
        write_text(folder / "best.toml", best_toml(found.plan, drawn, folder, words))
    if found.plan.settings.keep == "best":
        _make_room(found, shared)
    return found


def _make_room(found: Findings, shared: SharedStudy) -> None:
    """Delete the checkpoints of trials that have ended and are not the best."""
    for row in found.rows:
        checkpoints: Path = shared.run_folder(row.trial) / "checkpoints"
        if row.state != "open" and row is not found.best and checkpoints.exists():
            remove_folder(checkpoints)


def findings_lines(found: Findings) -> list[str]:
    """The best trials as a table, with the configuration as it is, and what is to be said of the best."""
    names = [each.name for each in found.plan.parameters]
    sign = 1 if found.plan.lower_is_better else -1
    ranked = sorted(found.rows, key=lambda row: (row.value is None, sign * (row.value or 0.0), row.trial))
    shown = ranked[:_SHOWN] + [row for row in ranked[_SHOWN:] if row is found.default]
    head = ("trial", found.plan.settings.metric, "state", "steps", "CPU s", *names)
    table = table_lines(head, [_cells(row, names, found) for row in shown]) if shown else []
    left = [f"and {len(ranked) - len(shown)} more in trials.jsonl"] if len(ranked) > len(shown) else []
    return [*table, *left, *(found.words() if found.best is not None else [])]


def _cells(row: TrialRow, names: Sequence[str], found: Findings) -> tuple[str, ...]:
    mark = " (as it is)" if row is found.default else ""
    value = row.value if row.value is not None else row.last
    shown = "-" if value is None else f"{value:.5f}"
    numbers = (shown, row.state, f"{row.steps:,}", f"{row.cpu_s:,.0f}")
    return (f"{row.trial}{mark}", *numbers, *(value_text(row.parameters, name) for name in names))


def value_text(parameters: Mapping[str, Any], name: str) -> str:
    """A value of a parameter with four digits; a dash stands for none."""
    value = parameters.get(name, "-")
    return f"{value:.4g}" if isinstance(value, float) else str(value)
