"""`tandemrec bench scaling`: how the cost of a training step grows with each size, as exponents."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from benchmarks.loops import one_thread, timed
from benchmarks.report import provenance, write_report
from benchmarks.synthetic import Draws, Shape, as_batch
from pipelines.console import quiet_third_parties, table_lines
from trainer.assemble import build_sharded
from trainer.config.toml import Settings, load_settings
from trainer.data.reader import Cursor, Step
from trainer.loop.pipeline import Pipeline
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import Config
from trainer.update.guard import Guard
from trainer.update.step import TrainStep, make_optimizer


class Point(Settings):
    """Sizes of one measurement.

    Attributes:
        length, k, dim: L, K, width of each table.
        rows: of the item table, of which `touched` may occur.
        users: of a step; candidates: of each of their 19 requests.
    """

    length: PositiveInt = 1_000
    k: PositiveInt = 20
    dim: PositiveInt = 16
    rows: PositiveInt = 10_000
    touched: PositiveInt = 10_000
    users: PositiveInt = 12
    candidates: PositiveInt = 3

    @property
    def shape(self) -> Shape:
        spread = self.rows // self.touched
        return Shape(
            self.touched, 100, self.length, self.users, candidates=self.candidates, spread=max(spread, 1)
        )


class Sweep(Settings):
    """One size grows, the others stay.

    Attributes:
        size: of `Point`; values: ascending; limit: the exponent of time and memory a sample that may not be
            exceeded.
    """

    size: Literal["length", "k", "dim", "rows", "users", "candidates"]
    values: tuple[PositiveInt, ...] = Field(min_length=2)
    limit: NonNegativeInt = 1


_SWEEPS = (
    Sweep(size="length", values=(125, 250, 500, 1_000, 2_000, 4_000, 8_000)),
    Sweep(size="k", values=(10, 20, 40, 80, 160, 320)),
    Sweep(size="dim", values=(8, 16, 32, 64, 128)),
    Sweep(size="users", values=(3, 6, 12, 24, 48), limit=0),
    Sweep(size="candidates", values=(1, 2, 4, 8, 16, 32), limit=0),
    Sweep(size="rows", values=(10_000, 100_000, 1_000_000, 10_000_000), limit=0),
)


class ScalingBench(Settings):
    """What is measured.

    Attributes:
        seed: of ids, labels and first weights; base: the point that all sweeps go through; sweeps: of sizes.
    """

    seed: int = Field(7, ge=0)
    base: Point = Point()
    sweeps: tuple[Sweep, ...] = _SWEEPS


@one_thread()
def bench_scaling(config: Path | None, overrides: Sequence[str], repeats: int, report: Path | None) -> None:
    """Processor seconds and peak memory a sample of a training step, and exponents fitted to them.

    On one rank and thread; points of a sweep are interleaved. Memory is what PyTorch allocates in the step
    at the same time, counted by its profiler: tables and the batch are not in it. An exponent is the slope
    of least squares through the logarithms; the last slope is that of the two largest sizes, where constant
    costs matter least. `config` is a TOML of `ScalingBench`.
    """
    quiet_third_parties()
    settings = load_settings(ScalingBench, config, overrides)
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    with process_group() as ranks, tempfile.TemporaryDirectory() as folder:
        for sweep in settings.sweeps:
            found = _sweep(settings, sweep, repeats, ranks, Path(folder))
            rows += found
            ratios |= _exponents(sweep, found)
            _print(sweep, found, ratios)
    print("\n".join(provenance(settings.seed, repeats)))
    if report is not None:
        write_report(report, rows, ratios, {"settings": settings.model_dump(mode="json"), "repeats": repeats})


def config_of(point: Point) -> Config:
    """configs/dare.toml at these sizes."""
    group = {"dim": point.dim, "learning_rate": 0.2}
    return Config.model_validate(
        {
            "data": {"history_length": point.length},
            "model": {"k": point.k},
            "groups": {"attention": group, "representation": group},
            "train": {"learning_rate": 0.003, "warmup_steps": 100},
        }
    )


def _sweep(
    settings: ScalingBench, sweep: Sweep, repeats: int, ranks: Ranks, folder: Path
) -> list[dict[str, Any]]:
    points = [settings.base.model_copy(update={sweep.size: value}) for value in sweep.values]
    steps = [training_step(point, settings.seed, ranks, folder) for point in points]
    seconds: list[list[float]] = [[] for _ in points]
    for number in range(repeats + 1):
        for step, found in zip(steps, seconds, strict=True):
            cpu = timed(step).cpu
            if number:  # the first warms up
                found.append(cpu)
    rows = []
    for point, step, found in zip(points, steps, seconds, strict=True):
        samples = point.shape.samples
        each = [1e6 * value / samples for value in found]
        rows.append(
            {
                "name": f"{sweep.size} {getattr(point, sweep.size):,}",
                "sweep": sweep.size,
                "value": getattr(point, sweep.size),
                "samples": samples,
                "cpu_us_a_sample": statistics.median(each),
                "min": min(each),
                "max": max(each),
                "bytes_a_sample": peak_bytes(step) / samples,
            }
        )
    return rows


def training_step(point: Point, seed: int, ranks: Ranks, folder: Path) -> Callable[[], object]:
    """Trains a model of these sizes on one batch each time it is called."""
    config, manifest = config_of(point), point.shape.manifest()
    model = build_sharded(config, manifest, ranks).model
    rows = Draws(point.shape, seed).step()
    batch = as_batch(rows, manifest, config.data, point.shape.requests)
    step = TrainStep(
        config, model, make_optimizer(model, config.train), ranks.world_size, Guard(ranks, folder)
    )
    pipeline = Pipeline("none", model, step, ranks.device)
    return lambda: deque(pipeline.train([Step(batch, True, Cursor())]), maxlen=0)


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that PyTorch's CPU allocator handed out during the work and had not got back."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _without_stderr(),
        torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile,
    ):
        work()
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return int(held.max(initial=0))


@contextmanager
def _without_stderr() -> Iterator[None]:
    """The profiler announces every start and stop there, from C++; exceptions are reported afterwards."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _exponents(sweep: Sweep, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    found = {}
    size = np.log([row["value"] for row in rows])
    for kind, name in (("time", "cpu_us_a_sample"), ("memory", "bytes_a_sample")):
        cost = np.log([row[name] for row in rows])
        found[f"{sweep.size}_{kind}_exponent"] = float(np.polyfit(size, cost, 1)[0])
        found[f"{sweep.size}_{kind}_last_slope"] = float(np.diff(cost)[-1] / np.diff(size)[-1])
    return found


def _print(sweep: Sweep, rows: Sequence[dict[str, Any]], ratios: dict[str, float]) -> None:
    cells = [
        [
            row["name"],
            f"{row['samples']:,}",
            f"{row['cpu_us_a_sample']:,.1f}",
            f"{row['min']:,.1f}-{row['max']:,.1f}",
            f"{row['bytes_a_sample'] / 1024:,.1f}",
        ]
        for row in rows
    ]
    print("\n".join(table_lines(["a sample", "samples/step", "median CPU us", "min-max", "peak KiB"], cells)))
    for kind in ("time", "memory"):
        exponent, last = (ratios[f"{sweep.size}_{kind}_{what}"] for what in ("exponent", "last_slope"))
        print(f"{kind}: {sweep.size}^{exponent:.2f}, at the end ^{last:.2f}; expected at most ^{sweep.limit}")
    print(flush=True)
