"""`tandemrec analyze`: what the tables and models of some runs have learned, as a page of figures."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from embeddings.errors import TandemError
from pipelines.analyze.options import AnalyzeOptions
from pipelines.analyze.report.model import Report, Section, Table
from pipelines.analyze.report.write import check_target, write_report
from pipelines.analyze.runs import AnalysedRun, open_runs
from pipelines.analyze.sections import Analyse, chosen
from pipelines.console import quiet_third_parties
from trainer.ranks.process_group import process_group
from trainer.run_folder import RunFolder, versions


def analyze(paths: Sequence[Path], out: Path, options: AnalyzeOptions) -> Report:
    """Analyse runs side by side and write a report of them to `out`; says what stands out.

    One process does it, whatever number of ranks trained the runs.

    Raises:
        ConfigError: a run or a section is not there, or `out` is something else than a report.
        CheckpointError: a run has no usable checkpoint. DataError: its log is damaged or not there.
    """
    sections = chosen(options.what)
    check_target(out)
    quiet_third_parties()
    train = RunFolder(paths[0]).read_config().train
    with process_group(train.timeout_s, options.device or train.device, alone=True) as ranks:
        runs = open_runs(paths, ranks, options.which)
        written = []
        for name, analyse in sections.items():
            began = time.perf_counter()
            print(f"{name} ...", flush=True)
            section = _analysed(name, analyse, runs, options)
            written.append(section)
            print(_line(name, section, time.perf_counter() - began), flush=True)
    report = Report(_title(runs), _table_of(runs), tuple(written), _facts(options))
    page = write_report(report, out)
    print("\n".join(["", *(f"{each.level}: {each.text}" for each in report.findings), f"page: {page}"]))
    return report


def _analysed(name: str, analyse: Analyse, runs: Sequence[AnalysedRun], options: AnalyzeOptions) -> Section:
    """A section; where it cannot be made, one that says why, so that the others are not lost."""
    try:
        return analyse(runs, options)
    except TandemError as error:
        return Section(name, name.capitalize(), "", skipped=(f"{error}",))


def _line(name: str, section: Section, seconds: float) -> str:
    """What the console says of a section."""
    lines = [f"{name}: {len(section.figures)} figures, {seconds:.1f} s"]
    return "\n".join([*lines, *(f"  left out: {text}" for text in section.skipped)])


def _title(runs: Sequence[AnalysedRun]) -> str:
    labels = [*dict.fromkeys(run.label for run in runs)]
    return f"Analysis of {' and '.join([', '.join(labels[:-1]), labels[-1]] if labels[1:] else labels)}"


def _table_of(runs: Sequence[AnalysedRun]) -> Table:
    """What was analysed."""
    rows = tuple(
        (run.name, run.label, run.seed, run.step, run.checkpoint.name, str(run.config.data.log))
        for run in runs
    )
    columns = ("run", "config", "seed", "step", "checkpoint", "log")
    return Table("runs", "Runs", "Runs of one config differ in their seed alone.", columns, rows)


def _facts(options: AnalyzeOptions) -> dict[str, str]:
    """How the report was made."""
    sample = f"about {options.sample:,} candidates of whole users" if options.sample else "all candidates"
    seed = "train.seed of each run" if options.seed is None else str(options.seed)
    made = {"command": " ".join(["tandemrec", *sys.argv[1:]]), "split": options.split, "sample": sample}
    return {**made, "seed": seed, **versions()}
