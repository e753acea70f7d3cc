"""Presets for several tasks on one log, each beside a model of its size for every single task

    tandemrec bench tasks --log LOG --config configs/mmoe.toml --config configs/stem.toml \
        --seeds 17,18,19,20,21 --out runs/tasks --jobs 2 [--set train.epochs=2 ...] [--page FILE.md]

The control of a preset is one model for each task, `--control` with that task alone, whose representation is
as wide as all sets of the preset together: so each task has a model with as many weights for itself as the
preset has for all of them. Presets of one size share their controls. Runs are made as by `bench models`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from benchmarks.harness.options import Options, own_command
from benchmarks.harness.report import Report
from benchmarks.models import (
    Job,
    Record,
    add_options,
    environment_line,
    make_job,
    mean,
    read_options,
    run_jobs,
    seeds_of,
)

SHOWN = {"auc": "AUC", "gauc": "GAUC", "logloss": "logloss", "pcoc": "PCOC"}


class Model(NamedTuple):
    """A preset on a log.

    Attributes:
        preset: its file; tasks: name -> overrides with which a model has that task alone.
        width: of the representation of one feature, over all sets; weights: of tables and everything dense.
    """

    preset: Path
    tasks: Mapping[str, tuple[str, ...]]
    width: int
    weights: int


def model_of(preset: Path, log: Path, overrides: Sequence[str]) -> Model:
    """Build the preset without memory for its tables, and count."""
    from trainer.assemble import build_trainable
    from trainer.config.tasks import resolve_tasks
    from trainer.log.schema import read_manifest
    from trainer.run_config import load_config

    config = load_config(preset, (*overrides, f"data.log={log}"))
    manifest = read_manifest(log)
    model, groups = build_trainable(config, manifest, torch.device("meta"))
    weights = sum(parameter.numel() for parameter in model.parameters())
    # The width that one set would have with as many numbers. A prior does not count: it says nothing itself.
    tables = groups[config.model.roles.representation_target].tables
    numbers = sum(table.rows * table.dim for table in tables)
    rows = sum({table.feature: table.rows for table in tables}.values())
    tasks = {
        task.name: (f"tasks.{task.name}.label={task.label}", f"tasks.{task.name}.mask={task.settings.mask}")
        for task in resolve_tasks(config.tasks, manifest.tasks)
    }
    return Model(preset, tasks, 4 * max(1, round(numbers / rows / 4)), weights)


def control_jobs(
    control: Path, model: Model, log: Path, overrides: Sequence[str], seeds: Sequence[int]
) -> dict[str, list[Job]]:
    """Task -> one job a seed, of a model for that task alone with the width of `model`."""
    jobs = {}
    of_all = [override for override in overrides if not override.startswith("tasks.")]
    for task, alone in model.tasks.items():
        every = (*of_all, *alone, f"groups.representation.dim={model.width}")
        jobs[task] = [make_job(control, log, every, seed) for seed in seeds]
    return jobs


def values_of(records: Sequence[Record], split: str, task: str, metric: str) -> list[float]:
    """A metric of one task, of each record."""
    return [float(record[split]["tasks"][task][metric]) for record in records]


def cells_of(
    model: Model, own: Sequence[Record], controls: Mapping[str, Sequence[Record]], split: str
) -> list[list[str]]:
    """A line for each task: metrics of the preset, AUC of its control, and seeds on which it leads."""
    lines = []
    for task in model.tasks:
        metrics = [mean(values_of(own, split, task, name)) for name in SHOWN]
        ours, theirs = values_of(own, split, task, "auc"), values_of(controls[task], split, task, "auc")
        leads = sum(a > b for a, b in zip(ours, theirs, strict=True))
        lead = f"{fmean(ours) - fmean(theirs):+.4f}"
        lines.append([task, model.preset.stem, *metrics, mean(theirs), lead, f"{leads} of {len(ours)}"])
    return lines


def main(words: Sequence[str]) -> None:
    options = Options("tasks", __doc__)
    add_options(options)
    options.add_argument(
        "--control",
        type=Path,
        default=Path("configs/shared_bottom.toml"),
        help="preset of the single-task models",
    )
    options.add_argument("--split", default="test", choices=("validation", "test"))
    given = read_options(options, words)
    if given is None:
        return
    log, seeds = given.log.absolute(), seeds_of(given)
    models = [model_of(preset, log, given.overrides) for preset in given.config]
    own = {m.preset: [make_job(m.preset, log, given.overrides, seed) for seed in seeds] for m in models}
    controls = {m.preset: control_jobs(given.control, m, log, given.overrides, seeds) for m in models}
    every = [job for jobs in own.values() for job in jobs]
    every += [job for by_task in controls.values() for jobs in by_task.values() for job in jobs]
    report = Report(given, "Tasks", n=len(seeds))
    report.rows = run_jobs(list({job.name: job for job in every}.values()), given, own_command("tasks"))
    records = {record["name"]: record for record in report.rows}

    def made(jobs: Sequence[Job]) -> list[Record]:
        return [records[job.name] for job in jobs]

    sizes = [
        [
            model.preset.stem,
            f"{model.weights:,}",
            str(model.width),
            f"{fmean(record['cpu_s'] for record in made(own[model.preset])):.0f}",
        ]
        for model in models
    ]
    report.cells(["preset", "weights", "width of the control", "training, processor s"], sizes)
    lines: list[list[str]] = []
    for model in models:
        by_task: dict[str, Any] = {task: made(jobs) for task, jobs in controls[model.preset].items()}
        lines += cells_of(model, made(own[model.preset]), by_task, given.split)
    order = list(dict.fromkeys(task for model in models for task in model.tasks))
    lines.sort(key=lambda line: order.index(line[0]))
    report.cells(["task", "preset", *SHOWN.values(), "control's AUC", "lead", "seeds that lead"], lines)
    report.line(environment_line(report.rows, given.jobs))
    report.close()
