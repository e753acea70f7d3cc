"""A worker: takes trials until none is left."""

from __future__ import annotations

import gc
import multiprocessing
import sys
from functools import partial
from pathlib import Path
from textwrap import shorten

from embeddings.agreement import from_rank_0
from pipelines.console import quiet_third_parties
from pipelines.tune.plan import StudyPlan
from pipelines.tune.report import value_text, write_findings
from pipelines.tune.study import Claim, Outcome, SharedStudy, Validation
from pipelines.tune.trial import LOG, run_trial
from trainer.ranks.process_group import Ranks, process_group

# The characters of a reason that a line shows.
_REASON = 80


def work(plan: StudyPlan, folder: Path, url: str) -> bool:
    """Take trials of a study until none is left -> whether that came, and not a signal to stop.

    Under torchrun all ranks are one worker, which trains one trial after the other.

    Raises:
        TandemError: what would end every trial; the one that it ended is taken up by the next start.
    """
    quiet_third_parties()
    with process_group(plan.base.train.timeout_s, plan.base.train.device) as ranks:
        # Rank 0 alone knows the study; what it finds, all ranks hear.
        opened: list[SharedStudy] = []
        from_rank_0(lambda: opened.append(SharedStudy(plan, folder, url)))
        try:
            return _take_turns(plan, folder, ranks, opened)
        finally:
            for shared in opened:
                shared.close()


def _take_turns(plan: StudyPlan, folder: Path, ranks: Ranks, opened: list[SharedStudy]) -> bool:
    # A trial's own lines go to a file meanwhile.
    console = sys.stdout

    def report(seen: Validation) -> bool:
        pruned = opened[0].report(seen)
        line = f"trial {opened[0].number}: {plan.settings.metric} {seen.value:.5f} after step {seen.step:,}"
        print(line, file=console, flush=True)
        return pruned

    while (claim := from_rank_0(lambda: _claim(opened[0]), slow=True)) is not None:
        place = folder / "trials" / f"{claim.number:04d}"
        outcome = run_trial(plan, claim, place, ranks, report)
        from_rank_0(partial(_finish, opened, outcome), slow=True)
        if outcome.state == "stopped":
            return False
        # A model has cycles, and the next one needs its memory.
        gc.collect()
    return True


def _claim(shared: SharedStudy) -> Claim | None:
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        # Whoever asked for this worker is gone, and may have asked for others.
        return None
    claim = shared.claim()
    if claim is not None:
        names = (each.name for each in shared.plan.parameters)
        given = {each.name: each.value_of(claim.drawn[each.name]) for each in shared.plan.parameters}
        shown = ", ".join(f"{name} {value_text(given, name)}" for name in names)
        again = f" (start {claim.starts})" if claim.starts > 1 else ""
        _say(f"trial {claim.number}{again}: {shown}")
    return claim


def _finish(opened: list[SharedStudy], outcome: Outcome) -> None:
    shared = opened[0]
    number = shared.number
    whole = shared.finish(outcome)
    with shared.alone():
        write_findings(shared)
    told = {
        "complete": f"complete, {shared.plan.settings.metric} {whole.value:.5f}",
        "pruned": "pruned",
        # The first reason comes in full at the end of a study without any value.
        "failed": f"failed: {shorten(whole.reason, _REASON, placeholder=' ...')}",
        "stopped": "stopped as asked; the same command goes on with it",
    }
    place = shared.run_folder(number) / LOG
    where = f"; see {place}" if whole.state == "failed" else ""
    _say(f"trial {number}: {told[whole.state]}, {whole.steps:,} steps, {whole.cpu_s:,.0f} CPU s{where}")


def _say(line: str) -> None:
    print(line, flush=True)
