"""How the cost of a training step grows with each size, as exponents

Processor seconds and peak memory a sample of a training step, on one rank and thread; the points of a sweep
run in turn. Memory is what PyTorch allocates in the step at the same time, counted by its profiler: tables
and the batch are not in it. An exponent is the slope of least squares through the logarithms; the last slope
is that of the two largest sizes, where constant costs matter least. --config is a TOML of `ScalingBench`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import one_thread, rounds, seconds_of, spread
from benchmarks.inputs.cells import config_with
from benchmarks.inputs.synthetic import Draws, Shape, as_batch
from trainer.assemble import build_sharded
from trainer.config.toml import Settings, load_settings
from trainer.data.cursor import Cursor
from trainer.data.reader import Step
from trainer.loop.pipeline import Pipeline
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import Config
from trainer.update.guard import Guard
from trainer.update.step import TrainStep, make_optimizer

COLUMNS = {
    "a sample": "{name}",
    "samples/step": "{samples:,}",
    "median CPU us": "{cpu_us_a_sample:,.1f}",
    "min-max": "{min:,.1f}-{max:,.1f}",
    "peak KiB": "{kib_a_sample:,.1f}",
}
_AXES = {
    "length": "history length L",
    "k": "kept behaviors K",
    "dim": "width of a table",
    "users": "users in a step (57 candidates each)",
    "candidates": "candidates of a request",
    "rows": "table rows (10,000 of them touched)",
}


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
    """A sweep: one size grows, the others stay.

    Attributes:
        size: the field of `Point` that grows; values: its values, ascending.
        limit: the largest exponent of time and memory a sample that is expected.
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
    """The settings of this benchmark.

    Attributes:
        seed: of ids, labels and first weights; base: the point that all sweeps go through; sweeps: of sizes.
    """

    seed: int = Field(7, ge=0)
    base: Point = Point()
    sweeps: tuple[Sweep, ...] = _SWEEPS


@one_thread()
def main(words: Sequence[str]) -> None:
    options = Options("scaling", __doc__).measuring(config=False)
    options.add_argument(
        "--image", type=Path, metavar="FILE.png", help="also draw the curves (needs matplotlib)"
    )
    options.add_argument("--draw", type=Path, metavar="FILE", help="measure nothing: draw what --json kept")
    given = options.read(words)
    if given.draw is not None:
        draw(
            json.loads(given.draw.read_text(encoding="utf-8")), given.image or given.draw.with_suffix(".png")
        )
        return
    settings = load_settings(ScalingBench, given.config, given.overrides)
    report = Report(given, "Scaling", seed=settings.seed)
    report.facts = {"settings": settings.model_dump(mode="json"), "repeats": given.repeats}
    with process_group() as ranks, tempfile.TemporaryDirectory() as folder:
        for sweep in settings.sweeps:
            rows = _sweep(settings, sweep, given.repeats, ranks, Path(folder))
            report.rows += rows
            report.ratios |= _exponents(sweep, rows)
            report.table(COLUMNS, [{**row, "kib_a_sample": row["bytes_a_sample"] / 1024} for row in rows])
            _show_exponents(sweep, report)
    report.close()
    if given.image is not None:
        draw({"rows": report.rows, "ratios": report.ratios}, given.image)


def config_of(point: Point) -> Config:
    """configs/dare.toml at these sizes."""
    groups = ["attention", "representation"]
    return config_with({"k": point.k}, groups, point.dim, point.length)


def _sweep(settings: ScalingBench, sweep: Sweep, repeats: int, ranks: Ranks, folder: Path) -> list[Row]:
    points = [settings.base.model_copy(update={sweep.size: value}) for value in sweep.values]
    steps = [training_step(point, settings.seed, ranks, folder) for point in points]
    taken = rounds({number: partial(seconds_of, step) for number, step in enumerate(steps)}, repeats)
    rows = []
    for number, (point, step) in enumerate(zip(points, steps, strict=True)):
        samples, value = point.shape.samples, getattr(point, sweep.size)
        rows.append(
            {
                "name": f"{sweep.size} {value:,}",
                "sweep": sweep.size,
                "value": value,
                "samples": samples,
                **spread([1e6 * seconds.cpu / samples for seconds in taken[number]], "cpu_us_a_sample"),
                "bytes_a_sample": peak_bytes(step) / samples,
            }
        )
    return rows


def training_step(point: Point, seed: int, ranks: Ranks, folder: Path) -> Callable[[], object]:
    """A function that trains a model of these sizes on the same batch each time it is called."""
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
    """The most bytes that PyTorch's CPU allocator had handed out at one time during the work."""
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
    """A context without stderr, where the profiler announces every start and stop from C++.

    Exceptions are reported afterwards.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _exponents(sweep: Sweep, rows: Sequence[Row]) -> dict[str, float]:
    exponents = {}
    size = np.log([row["value"] for row in rows])
    for kind, name in (("time", "cpu_us_a_sample"), ("memory", "bytes_a_sample")):
        cost = np.log([row[name] for row in rows])
        exponents[f"{sweep.size}_{kind}_exponent"] = float(np.polyfit(size, cost, 1)[0])
        exponents[f"{sweep.size}_{kind}_last_slope"] = float(np.diff(cost)[-1] / np.diff(size)[-1])
    return exponents


def _show_exponents(sweep: Sweep, report: Report) -> None:
    size = sweep.size
    for kind in ("time", "memory"):
        exponent, last = (report.ratios[f"{size}_{kind}_{what}"] for what in ("exponent", "last_slope"))
        report.line(f"{kind}: {size}^{exponent:.2f}, at the end ^{last:.2f}; expected at most ^{sweep.limit}")
    report.line()


def draw(tree: dict[str, Any], out: Path) -> None:
    """One panel a size, both axes logarithmic: times on the left axis, memory on the right.

    The legend has the fitted exponents.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for panel, (sweep, name) in zip(panels.flat, _AXES.items(), strict=True):
        rows = [row for row in tree["rows"] if row["sweep"] == sweep]
        size, beside = [row["value"] for row in rows], panel.twinx()
        time = [row["cpu_us_a_sample"] for row in rows]
        spread = [[t - row["min"] for t, row in zip(time, rows, strict=True)]]
        spread.append([row["max"] - t for t, row in zip(time, rows, strict=True)])
        exponents = [tree["ratios"][f"{sweep}_{kind}_exponent"] for kind in ("time", "memory")]
        label = f"processor time, exponent {exponents[0]:.2f}"
        lines = [panel.errorbar(size, time, spread, fmt="o-", color="tab:blue", capsize=2, label=label)]
        memory = [row["bytes_a_sample"] / 1024 for row in rows]
        label = f"peak memory, exponent {exponents[1]:.2f}"
        lines += beside.plot(size, memory, "s--", color="tab:orange", label=label)
        panel.set(xscale="log", yscale="log", xlabel=name, ylabel="microseconds a sample")
        panel.set_xticks(size, [f"{value:,}" for value in size], fontsize=7)
        panel.minorticks_off()
        panel.set_ylim(min(time) / 3, max(time) * 3)
        beside.set(yscale="log", ylabel="KiB a sample")
        beside.minorticks_off()
        beside.set_ylim(min(memory) / 3, max(memory) * 3)
        panel.legend(handles=lines, loc="best", fontsize=8)
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out, dpi=90)
