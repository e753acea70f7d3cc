"""`tandemrec bench step`: the trainer's step loop against a bare TorchRec loop, same model, same batches."""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch

from pipelines.bench_report import required, write_report
from pipelines.console import quiet_third_parties, table_lines
from trainer.assemble import build_sharded, feature_rows
from trainer.checkpoint import Found
from trainer.config import Config, load_config
from trainer.data.reader import Cursor, SequenceLogReader, Step
from trainer.data.schema import read_manifest
from trainer.distributed import Ranks, process_group
from trainer.loop import Trainer
from trainer.loss import loss_sum
from trainer.nonfinite import Guard
from trainer.pipeline import Pipeline
from trainer.run import RunFolder, versions
from trainer.step import TrainStep, make_optimizer

_STEPS = 40
Seconds = tuple[float, float]


def bench_step(config: Path | None, overrides: Sequence[str], repeats: int, report: Path | None) -> None:
    """Seconds a step takes in each kind of loop, measured interleaved over batches held in memory.

    On one rank and one thread; `repeats` rounds after one that warms up. A ratio is the median of the
    rounds' ratios. Processor seconds are measured too: other work on the machine disturbs them less.
    """
    quiet_third_parties()
    settings = load_config(required(config), overrides)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with process_group() as ranks, tempfile.TemporaryDirectory() as folder:
        loops = _Loops(settings, ranks, Path(folder))
        kinds: dict[str, Callable[[], Seconds]] = {
            "bare TorchRec loop": loops.bare,
            "step, no check": lambda: loops.steps("no check", checked=False),
            "step, checked": lambda: loops.steps("checked", checked=True),
            "trainer": lambda: loops.trainer("none"),
            "trainer, sparse_dist": lambda: loops.trainer("sparse_dist"),
        }
        rounds = [{name: run() for name, run in kinds.items()} for _ in range(repeats + 1)][1:]
        facts = loops.facts()
    torch.set_num_threads(threads)
    rows = [_row(name, [each[name] for each in rounds], facts["steps"]) for name in kinds]
    ratios: dict[str, float] = {}
    for label, over, under in (
        ("trainer_to_bare", "trainer", "bare TorchRec loop"),
        ("check_to_no_check", "step, checked", "step, no check"),
        ("sparse_dist_to_none", "trainer, sparse_dist", "trainer"),
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
        train = config.train.model_copy(update={"epochs": 1, "validate_every": 0})
        checkpoint = config.checkpoint.model_copy(update={"every_steps": 0})
        self._config = config.model_copy(update={"train": train, "checkpoint": checkpoint})
        self._ranks, self._folder = ranks, folder
        self._manifest = read_manifest(config.data.log)
        self._models: dict[str, Any] = {}
        rows = feature_rows(build_sharded(config, self._manifest, ranks).groups)
        reader = SequenceLogReader(config.data, "train", rows, seed=config.train.seed)
        with closing(reader.steps()) as steps:
            self._replay = _Replay(list(islice(steps, _STEPS)))

    def facts(self) -> dict[str, float]:
        batches = [step.batch for step in self._replay.all]
        return {
            "steps": len(batches),
            "candidates": sum(batch.candidates for batch in batches),
            "behaviors": sum(batch.behaviors for batch in batches),
        }

    def bare(self) -> Seconds:
        """What TorchRec's documentation does, and no more."""
        model, optimizer = self._model("bare")
        started, started_cpu = time.perf_counter(), time.process_time()
        for step in self._replay.all:
            batch = step.batch.to(self._ranks.device)
            optimizer.zero_grad()
            total = loss_sum(model(batch).logits, batch.labels, batch.weight)
            (total / batch.step_candidates).backward()
            optimizer.step()
        return time.perf_counter() - started, time.process_time() - started_cpu

    def steps(self, name: str, checked: bool) -> Seconds:
        """The trainer's step without the loop around it."""
        model, optimizer = self._model(name)
        guard = Guard(self._ranks, self._folder) if checked else None
        step = TrainStep(self._config, model, optimizer, 1, guard)
        pipeline = Pipeline("none", model, step, self._ranks.device)
        started, started_cpu = time.perf_counter(), time.process_time()
        for _ in pipeline.train(self._replay.all, lambda: 0):
            pass
        return time.perf_counter() - started, time.process_time() - started_cpu

    def trainer(self, pipeline: str) -> Seconds:
        """All of it but checkpoints: schedules, metrics, progress and TensorBoard as configured."""
        model, _ = self._model(f"trainer {pipeline}")
        train = self._config.train.model_copy(update={"pipeline": pipeline})
        config = self._config.model_copy(update={"train": train})
        with tempfile.TemporaryDirectory(dir=self._folder) as run, redirect_stdout(io.StringIO()):
            reader = cast(SequenceLogReader, self._replay)
            trainer = Trainer(
                config, model, reader, None, self._ranks, RunFolder(Path(run)), lambda _: None, "", {}
            )
            end = trainer.run(Found(None, {}, []))
        return end.wall_s, end.cpu_s

    def _model(self, name: str) -> tuple[Any, Any]:
        if name not in self._models:
            model = build_sharded(self._config, self._manifest, self._ranks).model
            self._models[name] = model, make_optimizer(model, self._config.train)
        return cast(tuple[Any, Any], self._models[name])


class _Replay:
    """Stands for a reader: steps that were read before."""

    def __init__(self, steps: list[Step]) -> None:
        self.all, self.order = steps, ""
        self.candidates = sum(step.batch.step_candidates for step in steps)

    def steps(self, cursor: Cursor) -> Iterator[Step]:
        yield from self.all


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
