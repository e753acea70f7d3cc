"""Every preset on every log, over seeds, beside lines to beat; paired differences say what is better

    tandemrec bench league --out runs/league --jobs 2 [--logs NAME,...] [--presets NAME,...] [--seeds 17,18]
        [--steps N] [--raw devlog=DIR] [--page FILE.md]
    tandemrec bench league --smoke --out runs/league-smoke
    tandemrec bench league --adopt complete_journey/twin=STUDY/best.toml

league.toml beside this file says what there is. Logs that are missing are made. Each run is a process of
one thread: it trains, validates, scores the test split once and ends; a finished run is one line of
OUT/LOG/results.jsonl. Started again, the same command skips what is there and resumes what was interrupted.
--adopt takes what `tandemrec tune` has chosen for a log and a preset into rates/, where the league finds it.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness.options import Options, own_command
from benchmarks.harness.report import Report
from benchmarks.league.adopt import adopt
from benchmarks.league.declared import Entry, League, Tree, entries_of, entry_of, names_of, read_league
from benchmarks.league.draws import Model, read_drawn
from benchmarks.league.fitting import misfit
from benchmarks.league.lines import LINES
from benchmarks.league.logs import adapted, make_clustered, make_log, overrides_of
from benchmarks.league.page import INTRODUCTION, Section, progress_of, show_section
from benchmarks.league.runs import FACTS, jobs_of, line_jobs, run_one
from benchmarks.models import Job, Record, by_preset, environment_line, keep, record_of, results, run_jobs
from embeddings.errors import ConfigError, TandemError
from trainer.log.schema import read_manifest
from trainer.run_folder import RunFolder
from trainer.sealed_folder import remove_folder


@dataclass
class Played:
    """What came of a log so far.

    Attributes:
        jobs: asked for; records: of those that are done.
        tuned: presets whose rates were tuned for the log; adapted: preset -> its overrides on this log.
        left_out: preset -> why it was not run.
        failed: what went wrong, in a line each.
    """

    jobs: list[Job] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    tuned: set[str] = field(default_factory=set)
    adapted: dict[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


def options_of() -> Options:
    """The command line."""
    options = Options("league", __doc__)
    options.add_argument("--out", type=Path, default=Path("runs/league"))
    options.add_argument("--logs", default="", help="comma-separated; none: all")
    options.add_argument("--presets", default="", help="comma-separated; none: all of each log")
    options.add_argument("--seeds", default="", help="comma-separated; none: those of league.toml")
    options.add_argument("--steps", type=int, default=0, help="of each run at most; 0: a whole pass")
    options.add_argument("--raw", action="append", default=[], metavar="NAME=PLACE", help="data at hand")
    options.add_argument("--smoke", action="store_true", help="the small list, on small logs")
    options.add_argument("--keep", action="store_true", help="keep the checkpoints of finished logs")
    options.add_argument("--jobs", type=int, default=1, help="runs side by side; 0: in this process")
    options.add_argument("--threads", type=int, default=1, help="of each run")
    options.add_argument("--adopt", action="append", metavar="LOG/PRESET=BEST", help="take tuned rates")
    options.overriding()
    options.add_argument("--one", type=Path, help="make one run only, of this config, in this process")
    options.add_argument("--line", choices=sorted(LINES), help="the same of a line to beat")
    return options


def main(words: Sequence[str]) -> None:
    given = options_of().read(words)
    if given.one or given.line:
        run_one(given)
        return
    league = read_league()
    if given.adopt:
        for each in given.adopt:
            _adopt(each, league)
        return
    league = _asked_for(league, given)
    report = Report(given, "League", n=len(league.seeds))
    report.lines(INTRODUCTION.strip().splitlines())
    raw = dict(_named(each) for each in given.raw)
    failed = [problem for name in league.logs for problem in _show_log(report, league, name, raw, given)]
    report.close()
    if failed:
        print("\n".join(failed), file=sys.stderr)
        raise SystemExit(f"{len(failed)} parts are missing, see above; the same command tries them again")


def _show_log(
    report: Report, league: League, name: str, raw: Mapping[str, Path], given: Any
) -> Sequence[str]:
    """Run what is missing of a log and show its section; what went wrong, in a line each."""
    log = league.logs[name]
    try:
        place = make_log(name, log, given.out, raw, given.smoke)
    except TandemError as error:
        report.lines([f"## {log.title}"])
        report.line(f"Not run: {error}")
        return [f"{name}: {error}"]
    played = play(league, name, place, given)
    if played.records:
        show_section(report, _section(league, name, place, played, given), league.pairs)
        report.line(progress_of(played.records, len(played.jobs)))
        report.line(environment_line(played.records, max(given.jobs, 1)))
        report.rows += played.records
    if not played.failed and not given.keep:
        _trim(given.out / name)
    return played.failed


def play(league: League, name: str, place: Path, given: Any) -> Played:
    """Make the runs of a log that are missing, those on its copy with clusters last."""
    played, log = Played(), league.logs[name]
    overrides = [*overrides_of(log, place), *_limits(given)]
    entries = adapted(entries_of(league, name, _words(given.presets)), name, given.out)
    entries = _fitting(entries, place, overrides, played)
    jobs = [*line_jobs(place, league.tree), *jobs_of(entries, place, overrides, league.seeds)]
    _run(jobs, name, given, played)
    clustered = log.clustered
    if clustered is None:
        return played
    chosen = [each for each in clustered.presets if not given.presets or each in _words(given.presets)]
    first = next((job for job in jobs if job.preset.stem == clustered.of), None)
    if not chosen or first is None:
        played.left_out |= dict.fromkeys(chosen, f"its clusters are of the vectors of `{clustered.of}`")
        return played
    try:
        copy = make_clustered(clustered, name, given.out, given.out / name / first.name)
    except TandemError as error:
        played.left_out |= dict.fromkeys(chosen, str(error))
        played.failed.append(f"{name}: {error}")
        return played
    files = names_of(league)
    of_copy = [entry_of(league, name, files[preset]) for preset in chosen]
    of_copy = _fitting(of_copy, copy, overrides, played)
    _run(jobs_of(of_copy, copy, overrides, league.seeds), name, given, played)
    return played


def _fitting(entries: Sequence[Entry], log: Path, overrides: Sequence[str], played: Played) -> list[Entry]:
    """The presets that a log fits; of the others it is kept why."""
    found = []
    for entry in entries:
        if why := misfit(entry.config, log, [*overrides, *entry.overrides]):
            played.left_out[entry.name] = why
        else:
            found.append(entry)
            played.tuned |= {entry.name} if entry.tuned else set()
            played.adapted |= {entry.name: entry.overrides} if entry.overrides else {}
    return found


def _run(jobs: Sequence[Job], name: str, given: Any, played: Played) -> None:
    """Make runs; where some fail, the others count."""
    out = given.out / name
    of_log = Namespace(**{**vars(given), "out": out})
    played.jobs += jobs
    try:
        if given.jobs:
            run_jobs(jobs, of_log, own_command("league"), FACTS)
        else:
            _run_here(jobs, of_log)
    except SystemExit as stopped:
        if not isinstance(stopped.code, str):
            raise
        played.failed.append(f"{name}: {stopped.code}")
    done = results(out)
    played.records += [done[job.name] for job in jobs if job.name in done]


def _run_here(jobs: Sequence[Job], given: Any) -> None:
    """One after another in this process."""
    given.out.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        if job.name not in results(given.out):
            run_one(options_of().parse_args(job.words(given.out, given.threads)))
            keep(given.out, record_of(job, given.out, 0.0, given.threads, FACTS))


def _section(league: League, name: str, place: Path, played: Played, given: Any) -> Section:
    manifest, models = read_manifest(place), dict[str, list[Model]]()
    for preset, records in by_preset(played.records):
        drawn = {record["seed"]: read_drawn(given.out / name / record["name"]) for record in records}
        for task in manifest.tasks:
            of_task = {seed: each[task] for seed, each in drawn.items() if task in each}
            if of_task:
                models.setdefault(task, []).append(Model(preset, of_task, preset not in LINES))
    order = {task: models[task] for task in manifest.tasks if task in models}
    candidates = manifest.splits["train"].candidates if manifest.holds("train") else 0
    title = league.logs[name].title
    chosen = frozenset(played.tuned)
    return Section(title, played.records, order, chosen, candidates, played.adapted, played.left_out)


def _asked_for(league: League, given: Any) -> League:
    """The part of the list that the options name.

    Raises:
        ConfigError: something is named that is not in the list.
    """
    small = league.smoke if given.smoke else None
    logs, presets = _words(given.logs), _words(given.presets)
    if small is not None:
        given.presets = given.presets or ",".join(small.presets)
        given.steps = given.steps or small.steps
        logs = logs or list(small.logs)
        tree = Tree(trials=small.trials, iterations=small.iterations)
        league = league.model_copy(update={"seeds": small.seeds, "tree": tree})
    _known("--logs", logs, league.logs)
    _known("--presets", presets, names_of(league))
    seeds = tuple(int(seed) for seed in _words(given.seeds)) or league.seeds
    chosen = {name: log for name, log in league.logs.items() if not logs or name in logs}
    return league.model_copy(update={"seeds": seeds, "logs": chosen})


def _known(option: str, names: Sequence[str], known: Mapping[str, object]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"{option}: {name!r} is not one of {', '.join(sorted(known))}")


def _adopt(text: str, league: League) -> None:
    name, best = _named(text)
    log, _, preset = name.partition("/")
    _known("--adopt", [log], league.logs)
    _known("--adopt", [preset], names_of(league))
    print(adopt(best, log, preset))


def _limits(given: Any) -> list[str]:
    return [*([f"train.max_steps={given.steps}"] if given.steps else []), *given.overrides]


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _named(text: str) -> tuple[str, Path]:
    name, _, place = text.partition("=")
    if not place:
        raise ConfigError(f"{text!r}: write NAME=PLACE")
    return name, Path(place).absolute()


def _trim(out: Path) -> None:
    """Remove checkpoints of finished runs: scores, metrics and draws stay."""
    for name in results(out):
        remove_folder(RunFolder(out / name).checkpoints)
