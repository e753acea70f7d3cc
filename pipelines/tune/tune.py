"""`tandemrec tune`: a study over keys of a configuration, compared on the validation split."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from embeddings.errors import ConfigError, TandemError
from pipelines.tune.plan import StudyPlan, read_plan
from pipelines.tune.plot import plot_study
from pipelines.tune.report import Findings, findings_lines, write_findings
from pipelines.tune.study import SharedStudy
from pipelines.tune.trial import LOG
from pipelines.tune.worker import work
from trainer.ranks.machine import cores
from trainer.run_folder import check_writable
from trainer.storage import is_remote


@dataclass(frozen=True)
class TuneOptions:
    """How a study is run.

    Attributes:
        out: the study's folder, which all of its workers share; space: the file with the parameters.
        storage: the address of a database that keeps the trials; empty = a journal in the folder.
        trials: of the study; 0 = as the space says.
        jobs: processes of this machine that take trials.
    """

    out: Path
    space: Path
    storage: str = ""
    trials: int = 0
    jobs: int = 1


def tune(config: Path, options: TuneOptions, overrides: Sequence[str] = ()) -> None:
    """Run a study, or take part in one, or go on with it; then say what it has found.

    Raises:
        TandemError: something is wrong with what was given, or no trial was of use.
    """
    plan = read_plan(config, options.space, overrides, options.trials)
    _check_place(options)
    options.out.mkdir(parents=True, exist_ok=True)
    speaks = os.environ.get("RANK", "0") == "0"
    for line in _first_lines(plan) if speaks else ():
        print(line, flush=True)
    with _jobs(config, options, overrides) as others:
        over = work(plan, options.out, options.storage)
        for process in others if not over else ():
            # The signal may have reached this process alone.
            process.terminate()
    lost = [process.exitcode for process in others if process.exitcode]
    if over and lost:
        print(
            f"{len(lost)} of {len(others) + 1} jobs died, exit code {lost[0]}; this one goes on", flush=True
        )
        over = work(plan, options.out, options.storage)
    if speaks:
        _conclude(plan, options, over, _command(config, options, overrides))


def _first_lines(plan: StudyPlan) -> list[str]:
    lines = []
    if plan.outside:
        lines.append(
            f"the configuration as it is, is outside the space ({'; '.join(plan.outside)}): the first trial "
            "has what lies inside of it, and no trial says what the configuration itself is worth"
        )
    if plan.trials < plan.settings.trials:
        lines.append(f"the grid has {plan.trials} combination(s), fewer than study.trials")
    return lines


def _check_place(options: TuneOptions) -> None:
    if is_remote(options.out):
        raise ConfigError(
            f"--out {options.out}: a study is a folder that its workers lock and append to; give a folder of "
            "this machine, or one that machines share, such as NFS"
        )
    if options.jobs > 1 and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(
            f"--jobs {options.jobs}: under torchrun all ranks train one trial; leave --jobs out"
        )
    check_writable(options.out)


@contextmanager
def _jobs(config: Path, options: TuneOptions, overrides: Sequence[str]) -> Iterator[list[BaseProcess]]:
    """Other workers beside this one; they have ended when the block has."""
    context = multiprocessing.get_context("forkserver")
    if options.jobs > 1:
        # One server imports everything, and the workers are forked from it.
        context.set_forkserver_preload(["pipelines.tune.tune"])
        torch.set_num_threads(_threads(options.jobs))
    others = [
        context.Process(target=_job, args=(number, config, options, tuple(overrides)), daemon=True)
        for number in range(1, options.jobs)
    ]
    try:
        for process in others:
            process.start()
        yield list(others)
    except BaseException:
        for process in others:
            if process.pid is not None:
                # They save, and their trials are taken up by the next start.
                process.terminate()
        raise
    finally:
        for process in others:
            if process.pid is not None:
                process.join()


def _threads(jobs: int) -> int:
    return max(1, min(torch.get_num_threads(), cores() // jobs))


def _job(number: int, config: Path, options: TuneOptions, overrides: Sequence[str]) -> None:
    """One of several workers of a machine."""
    torch.set_num_threads(_threads(options.jobs))
    try:
        plan = read_plan(config, options.space, overrides, options.trials)
        work(plan, options.out, options.storage)
    except TandemError as error:
        print(
            f"tandemrec: job {number + 1}: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True
        )
        sys.exit(2)


def _command(config: Path, options: TuneOptions, overrides: Sequence[str]) -> str:
    """What goes on with a study."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return "the same command, which goes on with the study"
    words = ["tandemrec", "tune", "--config", config, "--space", options.space, "--out", options.out]
    words += ["--trials", options.trials] if options.trials else []
    words += ["--jobs", options.jobs] if options.jobs > 1 else []
    words += ["--storage", options.storage] if options.storage else []
    return shlex.join(map(str, [*words, *overrides]))


def _conclude(plan: StudyPlan, options: TuneOptions, over: bool, again: str) -> None:
    """Write and say what the study has found so far; `again`: the command that goes on with it."""
    shared = SharedStudy(plan, options.out, options.storage)
    picture = options.out / "study.png"
    with shared.alone():
        found = write_findings(shared)
        drawn = plot_study(found, picture)
    unfinished = _unfinished(found, options)
    for line in (*_surplus(found), *findings_lines(found), *unfinished):
        print(line)
    if found.best is None and over and not unfinished:
        raise ConfigError(f"{options.out}: {_why_nothing(found, options)}; narrow the space")
    best = options.out / "best.toml"
    if found.best is not None:
        files = [best, options.out / "trials.jsonl", *([picture] if drawn else [])]
        print(f"see {', '.join(map(str, files))}")
    train = f"{shlex.join(['tandemrec', 'train', '--config', str(best)])} --out RUN"
    print(f"next:   {again if unfinished else train}")


def _surplus(found: Findings) -> list[str]:
    """A line where the study was given fewer trials than it has."""
    begun, asked = len(found.rows), found.plan.trials
    if begun <= asked:
        return []
    return [f"the study has {begun} trials already, more than the {asked} asked for: no new one was begun"]


def _why_nothing(found: Findings, options: TuneOptions) -> str:
    for row in found.rows:
        if row.reason:
            log = options.out / "trials" / f"{row.trial:04d}" / LOG
            return f"{found.words()[0]}; the first reason: {row.reason}; see {log}"
    return found.words()[0]


def _unfinished(found: Findings, options: TuneOptions) -> list[str]:
    """What is left to do for the study, a line each; empty if it is over."""
    lines, asked, begun = [], found.plan.trials, len(found.rows)
    if count := found.counts.get("open", 0):
        lines.append(
            f"{count} trial(s) of {options.out} are not over: other workers have them, or the next start"
        )
    if begun < asked:
        lines.append(f"{asked - begun} of {asked} trials were not begun")
    return lines
