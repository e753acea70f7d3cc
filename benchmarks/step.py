"""`tandemrec bench step`: the trainer's step loop against a bare TorchRec loop, same model, same batches."""

from __future__ import annotations

import statistics
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, cast

from benchmarks.grid import bench_grid
from benchmarks.loops import Replay, Seconds, bare_loop, one_thread, timed, trainer_loop
from benchmarks.report import write_report
from pipelines.console import quiet_third_parties, table_lines
from trainer.assemble import build_sharded, feature_rows
from trainer.data.batch import pinning
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import read_manifest
from trainer.loop.pipeline import Pipeline
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import Config, load_config
from trainer.run_folder import versions
from trainer.update.guard import Guard
from trainer.update.step import TrainStep, make_optimizer

_STEPS = 40
# On CUDA, where the answer to the check is read a step late by default.
_WAITED = "step, check waited for"


@one_thread()
def bench_step(config: Path | None, overrides: Sequence[str], repeats: int, report: Path | None) -> None:
    """With a config, what the trainer's loop adds to a step on its log; without, the grid of `bench_grid`.

    Seconds a step takes in each kind of loop, measured interleaved over batches held in memory, on one rank
    and one thread; `repeats` rounds after one that warms up. A ratio is the median of the rounds' ratios.
    Processor seconds are measured too: other work on the machine disturbs them less.
    """
    if config is None:
        bench_grid(overrides, repeats, report)
        return
    quiet_third_parties()
    settings = load_config(config, overrides)
    device = settings.train.device
    with process_group(device=device) as ranks, tempfile.TemporaryDirectory() as folder:
        loops = _Loops(settings, ranks, Path(folder))
        waited: dict[str, Callable[[], Seconds]] = {}
        if Guard(ranks, Path(folder)).reads_late:
            waited = {_WAITED: lambda: loops.steps("waited", checked=True, late=False)}
        kinds: dict[str, Callable[[], Seconds]] = {
            "bare TorchRec loop": loops.bare,
            "step, no check": lambda: loops.steps("no check", checked=False),
            "step, checked": lambda: loops.steps("checked", checked=True),
            **waited,
            "trainer": lambda: loops.trainer("none"),
            "trainer, sparse_dist": lambda: loops.trainer("sparse_dist"),
        }
        rounds = [{name: run() for name, run in kinds.items()} for _ in range(repeats + 1)][1:]
        facts = loops.facts()
    rows = [_row(name, [each[name] for each in rounds], facts["steps"]) for name in kinds]
    ratios: dict[str, float] = {}
    for label, over, under in (
        ("trainer_to_bare", "trainer", "bare TorchRec loop"),
        ("check_to_no_check", "step, checked", "step, no check"),
        ("sparse_dist_to_none", "trainer, sparse_dist", "trainer"),
        *([("late_check_to_waiting", "step, checked", _WAITED)] if waited else []),
    ):
        for clock, kind in enumerate(("", "_cpu")):
            each = [found[over][clock] / found[under][clock] for found in rounds]
            ratios[f"{label}{kind}"] = statistics.median(each)
            facts |= {f"{label}{kind}_min": min(each), f"{label}{kind}_max": max(each)}
    _print(rows, ratios, facts, repeats)
    if report is not None:
        write_report(report, rows, ratios, facts)


class _Loops:
    """Loops over the same steps; each has a model of its own, all with the same first weights."""

    def __init__(self, config: Config, ranks: Ranks, folder: Path) -> None:
        self._config = config
        self._ranks, self._folder = ranks, folder
        self._manifest = read_manifest(config.data.log)
        self._models: dict[str, Any] = {}
        rows = feature_rows(build_sharded(config, self._manifest, ranks).groups)
        seed, prepare = config.train.seed, pinning(ranks.device)
        reader = SequenceLogReader(config.data, "train", rows, seed=seed, prepare=prepare)
        with closing(reader.steps()) as steps:
            self._replay = Replay(list(islice(steps, _STEPS)))

    def facts(self) -> dict[str, float]:
        batches = [step.batch for step in self._replay.all]
        return {
            "steps": len(batches),
            "candidates": sum(batch.candidates for batch in batches),
            "behaviors": sum(batch.behaviors for batch in batches),
        }

    def bare(self) -> Seconds:
        """What TorchRec's documentation does, and no more."""
        return bare_loop(*self._model("bare"), self._replay.all, self._ranks)

    def steps(self, name: str, checked: bool, late: bool | None = None) -> Seconds:
        """The trainer's step without the loop around it."""
        model, optimizer = self._model(name)
        guard = Guard(self._ranks, self._folder, late) if checked else None
        step = TrainStep(self._config, model, optimizer, 1, guard)
        pipeline = Pipeline("none", model, step, self._ranks.device)
        return timed(lambda: deque(pipeline.train(self._replay.all), maxlen=0))

    def trainer(self, pipeline: str) -> Seconds:
        """All of it but checkpoints: schedules, metrics, progress and TensorBoard as configured."""
        model, _ = self._model(f"trainer {pipeline}")
        train = self._config.train.model_copy(update={"pipeline": pipeline})
        config = self._config.model_copy(update={"train": train})
        return trainer_loop(config, model, self._replay.all, self._ranks, self._folder)

    def _model(self, name: str) -> tuple[Any, Any]:
        if name not in self._models:
            model = build_sharded(self._config, self._manifest, self._ranks).model
            self._models[name] = model, make_optimizer(model, self._config.train)
        return cast(tuple[Any, Any], self._models[name])


def _row(name: str, found: Sequence[Seconds], steps: float) -> dict[str, Any]:
    wall, cpu = ([1000 * each[clock] / steps for each in found] for clock in (0, 1))
    return {
        "name": name,
        "ms_a_step": statistics.median(wall),
        "min": min(wall),
        "max": max(wall),
        "cpu_ms_a_step": statistics.median(cpu),
    }


def _print(
    rows: Sequence[dict[str, Any]], ratios: dict[str, float], facts: dict[str, float], repeats: int
) -> None:
    cells = [
        [
            row["name"],
            f"{row['ms_a_step']:.2f}",
            f"{row['min']:.2f}-{row['max']:.2f}",
            f"{row['cpu_ms_a_step']:.2f}",
        ]
        for row in rows
    ]
    print("\n".join(table_lines([f"n = {repeats}", "median ms/step", "min-max", "processor ms/step"], cells)))
    for name, value in ratios.items():
        print(f"{name}: {value:.3f} ({facts[f'{name}_min']:.3f}-{facts[f'{name}_max']:.3f})")
    print(
        f"{facts['steps']} steps, {facts['candidates']:,} candidates, {facts['behaviors']:,} behaviors; "
        + "; ".join(f"{name} {version}" for name, version in versions().items())
    )
