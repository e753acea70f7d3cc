"""One trial: a run of `train` with the values that were drawn, watched at its validations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embeddings.agreement import from_every_rank, from_rank_0
from pipelines.train import End, run, settings_of
from pipelines.tune.plan import StudyPlan
from pipelines.tune.study import Claim, Outcome, Validation
from trainer.checkpoint.files import checkpoints, step_of
from trainer.config.sections import EarlyStoppingConfig
from trainer.loop.attempts import NoProgress
from trainer.loop.early_stopping import value_of, watched
from trainer.quality.domains import SplitMetrics
from trainer.ranks.process_group import Ranks
from trainer.run_config import of_files
from trainer.run_folder import RunFolder
from trainer.update.guard import NotFinite

LOG = "train.log"
# What a trial's values may bring about, alike on all ranks; whatever else is raised would end every trial.
_FAILURES = (NotFinite, NoProgress)


def run_trial(
    plan: StudyPlan, claim: Claim, folder: Path, ranks: Ranks, report: Callable[[Validation], bool]
) -> Outcome:
    """Train a trial, or go on with it; collective.

    Args:
        report: called on rank 0 with each validation; -> whether to end there.

    Raises:
        TandemError: what would end every trial.
    """
    began = time.process_time()
    steps, reason = _saved(folder), ""

    def after_step(number: int) -> None:
        nonlocal steps
        steps = number

    def spent() -> float:
        return sum(from_every_rank(lambda: time.process_time() - began))

    def after_validation(step: int, metrics: SplitMetrics, last: bool) -> bool:
        after_step(step)
        cpu_s, value = spent(), value_of(plan.watch, metrics.tasks)
        return from_rank_0(lambda: report(Validation(step, value, cpu_s, last)))

    end: End = "pruned"
    if not claim.pruned:
        try:
            end = _train(plan, claim, folder, ranks, after_step, after_validation)
        except _failures(ranks) as error:
            reason = str(error) or type(error).__name__
            from_rank_0(lambda: _note(folder, f"failed after step {steps:,}: {reason}"))
    cpu_s = spent()
    summary = from_rank_0(RunFolder(folder).read_summary)
    if reason:
        return Outcome("failed", steps=steps, cpu_s=cpu_s, reason=reason)
    if end == "complete":
        return _complete(plan.watch, summary, cpu_s)
    return Outcome(end, steps=steps, cpu_s=cpu_s)


def _saved(folder: Path) -> int:
    """The step of the newest checkpoint of an earlier start; 0 without one."""
    return max(map(step_of, checkpoints(RunFolder(folder).checkpoints)), default=0)


def _note(folder: Path, line: str) -> None:
    with (folder / LOG).open("a", encoding="utf-8") as log:
        log.write(f"{line}\n")


def _failures(ranks: Ranks) -> tuple[type[Exception], ...]:
    # Where one rank of several lacks memory, the others wait for it until they give up.
    alone = (torch.OutOfMemoryError,) if ranks.world_size == 1 else ()
    return (*_FAILURES, *alone)


def _train(
    plan: StudyPlan,
    claim: Claim,
    folder: Path,
    ranks: Ranks,
    after_step: Callable[[int], None],
    after_validation: Callable[[int, SplitMetrics, bool], bool],
) -> End:
    """-> how training ended. What it says goes to a file of the trial."""
    overrides = plan.overrides(claim.drawn)
    plan.check_unchanged()
    with (
        (folder / LOG).open("a", encoding="utf-8") as log,
        redirect_stdout(log),
        of_files(plan.config, overrides),
    ):
        settings = settings_of(plan.config, overrides)
        return run(settings, folder, ranks, after_step, after_validation=after_validation, baselines=False)


def _complete(watch: EarlyStoppingConfig, summary: Mapping[str, Any], cpu_s: float) -> Outcome:
    """The outcome of a run that has come to its end, by what it says of the weights that it keeps."""
    value = _value_in(watch, summary.get("validation", {}).get("tasks", {}))
    steps = int(summary.get("steps", 0))
    if not math.isfinite(value):
        return Outcome("failed", steps=steps, cpu_s=cpu_s, reason=f"validation has no {watch.metric}")
    return Outcome("complete", value, steps, cpu_s)


def _value_in(watch: EarlyStoppingConfig, tasks: Mapping[str, Mapping[str, Any]]) -> float:
    """The metric in an entry of a file, where null is what has no value."""
    values = [tasks[name][watch.metric] for name in watched(watch, tasks)] if tasks else []
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan
