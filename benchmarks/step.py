"""The training step, beside a bare TorchRec loop and plain PyTorch on the same samples

With --config, what the trainer's loop adds to a step on the config's log: seconds of a step in each kind of
loop. Without, a grid of made-up steps (--set takes keys of `StepBench`): samples per processor second of
every kind of loop in every cell. All kinds of a cell run in turn over batches held in memory, on one rank and
one thread; the first round warms up. A ratio is the median of the rounds' ratios. Processor seconds are
measured because other work on the machine disturbs them less.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from pydantic import Field, PositiveInt

from benchmarks.harness.loops import bare_loop, first_steps, trainer_loop
from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import Seconds, one_thread, rounds, seconds_of, spread
from benchmarks.inputs.cells import DARE_KINDS, Cell, Kind, config_of
from benchmarks.inputs.synthetic import Draws, as_batch, padded, row_per_sample, zipf_share
from benchmarks.rivals.plain_models import PlainDare, PlainMlpScorer, plain_loss
from trainer.assemble import build_sharded, feature_rows
from trainer.config.tasks import resolve_tasks
from trainer.config.toml import Settings, load_settings
from trainer.data.batch import pinning
from trainer.data.cursor import Cursor
from trainer.data.reader import SequenceLogReader, Step
from trainer.data.rows import UserRows
from trainer.log.schema import read_manifest
from trainer.loop.pipeline import Pipeline
from trainer.model.retrieve.score import MlpScorer
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import Config, load_config
from trainer.update.guard import Guard
from trainer.update.step import TrainStep, make_optimizer

_STEPS = 40
# On CUDA, where the answer to the check is read a step late by default.
_WAITED = "step, check waited for"
LOOP_COLUMNS = {
    "": "{name}",
    "median ms/step": "{ms_a_step:.2f}",
    "min-max": "{min:.2f}-{max:.2f}",
    "processor ms/step": "{cpu_ms_a_step:.2f}",
}
NAMES: Mapping[Kind, str] = {
    "plain": "plain PyTorch, rows, dense Adam",
    "published": "the same, all L looked up, 2 losses",
    "plain attention": "bare TorchRec, rows, [q;k;q-k;qk]",
    "rows": "bare TorchRec, rows",
    "bare, 1": "bare TorchRec, 1 request a block",
    "ours, 1": "ours, 1 request a block",
    "bare, blocks": "bare TorchRec, blocks",
    "ours, blocks": "ours, blocks",
}
CELL_COLUMNS = {
    "n": "{n}",
    "samples/CPU s": "{samples_per_cpu_s:,.0f}",
    "min-max": "{min:,.0f}-{max:,.0f}",
    "CPU ms/step": "{cpu_ms_a_step:,.1f}",
    "behaviors/sample": "{behaviors:.1f}",
}
_SLOW: tuple[Kind, ...] = ("plain", "published")
_FEW_KINDS: tuple[Kind, ...] = ("plain", "rows", "bare, blocks", "ours, blocks")
_DIN_KINDS: tuple[Kind, ...] = ("plain attention", *DARE_KINDS)
# Over and under the line of each ratio, where both were measured.
_RATIOS: tuple[tuple[str, Kind, Kind], ...] = (
    ("ours_to_plain", "ours, blocks", "plain"),
    ("ours_to_published_form", "ours, blocks", "published"),
    ("ours_to_plain_attention", "ours, blocks", "plain attention"),
    ("ours_to_bare", "ours, blocks", "bare, blocks"),
    ("ours_to_bare_1", "ours, 1", "bare, 1"),
    ("ours_to_rows", "ours, blocks", "rows"),
    ("blocks_to_1", "ours, blocks", "ours, 1"),
)
_GRID = (
    Cell(items=50_000, length=200, kinds=("plain", "published", *DARE_KINDS)),
    Cell(items=4_068_790, length=200, kinds=("plain", "published", *DARE_KINDS)),
    Cell(items=4_068_790, length=1_000, users=9),
    Cell(items=4_068_790, length=10_000, users=4, kinds=("rows", "bare, blocks", "ours, blocks")),
    Cell(items=50_000, length=200, dim=64, kinds=_FEW_KINDS),
    Cell(items=50_000, length=200, dim=128, kinds=_FEW_KINDS),
    Cell(model="din", items=1_000_000, length=200, users=18, kinds=_DIN_KINDS),
    Cell(model="din", items=1_000_000, length=1_000, users=4, kinds=_DIN_KINDS),
)


class StepBench(Settings):
    """The settings of the grid.

    Attributes:
        seed: of ids, labels and first weights; cells: the grid.
        steps: of one measurement, each over a batch of its own; slow_steps: of those on per-sample rows.
        slow_repeats: most measurements of plain PyTorch, whose steps take seconds.
    """

    seed: int = Field(7, ge=0)
    cells: tuple[Cell, ...] = _GRID
    steps: PositiveInt = 4
    slow_steps: PositiveInt = 1
    slow_repeats: PositiveInt = 3


@one_thread()
def main(words: Sequence[str]) -> None:
    given = Options("step", __doc__).measuring(config=False).read(words)
    if given.config is not None:
        config = load_config(given.config, given.overrides)
        _measure_loop(config, given.repeats, Report(given, "Step", seed=config.train.seed))
        return
    settings = load_settings(StepBench, None, given.overrides)
    report = Report(given, "Step", seed=settings.seed)
    report.facts = {"settings": settings.model_dump(mode="json"), "repeats": given.repeats}
    with process_group() as ranks, tempfile.TemporaryDirectory() as folder:
        for cell in settings.cells:
            _measure_cell(_Cell(cell, settings, ranks, Path(folder)), settings, given.repeats, report)
    report.close()


def _measure_loop(config: Config, repeats: int, report: Report) -> None:
    device = config.train.device
    with process_group(device=device) as ranks, tempfile.TemporaryDirectory() as folder:
        loops = _Loops(config, ranks, Path(folder))
        waits = Guard(ranks, Path(folder)).reads_late
        kinds: dict[str, Callable[[], Seconds]] = {
            "bare TorchRec loop": loops.bare,
            "step, no check": lambda: loops.steps("no check", checked=False),
            "step, checked": lambda: loops.steps("checked", checked=True),
            **({_WAITED: lambda: loops.steps("waited", checked=True, late=False)} if waits else {}),
            "trainer": lambda: loops.trainer("none"),
            "trainer, sparse_dist": lambda: loops.trainer("sparse_dist"),
        }
        taken = rounds(kinds, repeats)
        facts = loops.facts()
    for name, each in taken.items():
        wall = spread([1000 * seconds.wall / facts["steps"] for seconds in each], "ms_a_step")
        cpu = median(1000 * seconds.cpu / facts["steps"] for seconds in each)
        report.rows.append({"name": name, **wall, "cpu_ms_a_step": cpu})
    report.table(LOOP_COLUMNS, report.rows)
    report.facts |= facts
    for label, over, under in (
        ("trainer_to_bare", "trainer", "bare TorchRec loop"),
        ("check_to_no_check", "step, checked", "step, no check"),
        ("sparse_dist_to_none", "trainer, sparse_dist", "trainer"),
        *([("late_check_to_waiting", "step, checked", _WAITED)] if waits else []),
    ):
        for clock, suffix in enumerate(("", "_cpu")):
            one, other = ([seconds[clock] for seconds in taken[way]] for way in (over, under))
            report.ratio(f"{label}{suffix}", one, other, digits=3)
    report.line(
        f"{facts['steps']} steps, {facts['candidates']:,} candidates, {facts['behaviors']:,} behaviors"
    )
    report.close()


class _Loops:
    """Loops over the same steps; each has a model of its own, all with the same first weights."""

    def __init__(self, config: Config, ranks: Ranks, folder: Path) -> None:
        self._config = config
        self._ranks, self._folder = ranks, folder
        self._manifest = read_manifest(config.data.log)
        self._models: dict[str, Any] = {}
        rows = feature_rows(build_sharded(config, self._manifest, ranks).groups)
        seed, prepare = config.train.seed, pinning(ranks.device)
        tasks = resolve_tasks(config.tasks, self._manifest.tasks)
        reader = SequenceLogReader(config.data, "train", rows, tasks=tasks, seed=seed, prepare=prepare)
        self._held: Sequence[Step] = first_steps(reader, lambda steps: len(steps) == _STEPS).all

    def facts(self) -> dict[str, int]:
        batches = [step.batch for step in self._held]
        return {
            "steps": len(batches),
            "candidates": sum(batch.candidates for batch in batches),
            "behaviors": sum(batch.behaviors for batch in batches),
        }

    def bare(self) -> Seconds:
        return bare_loop(*self._model("bare"), self._held, self._ranks)

    def steps(self, name: str, checked: bool, late: bool | None = None) -> Seconds:
        """The trainer's step without the loop around it."""
        model, optimizer = self._model(name)
        guard = Guard(self._ranks, self._folder, late) if checked else None
        step = TrainStep(self._config, model, optimizer, 1, guard)
        pipeline = Pipeline("none", model, step, self._ranks.device)
        return seconds_of(lambda: deque(pipeline.train(self._held), maxlen=0))

    def trainer(self, pipeline: str) -> Seconds:
        model, _ = self._model(f"trainer {pipeline}")
        train = self._config.train.model_copy(update={"pipeline": pipeline})
        config = self._config.model_copy(update={"train": train})
        return trainer_loop(config, model, self._held, self._ranks, self._folder)

    def _model(self, name: str) -> tuple[Any, Any]:
        if name not in self._models:
            model = build_sharded(self._config, self._manifest, self._ranks).model
            self._models[name] = model, make_optimizer(model, self._config.train)
        return cast(tuple[Any, Any], self._models[name])


class _Cell:
    """The loops of one cell over the same samples, and the models they train.

    Loops over TorchRec share one model; its values do not change what a step costs.
    """

    def __init__(self, cell: Cell, settings: StepBench, ranks: Ranks, folder: Path) -> None:
        self.cell, self._ranks, self._folder = cell, ranks, folder
        self._config, self._manifest = config_of(cell), cell.shape.manifest()
        draws = Draws(cell.shape, settings.seed)
        users = [draws.step() for _ in range(max(settings.steps, settings.slow_steps))]
        self._users = {"few": users[: settings.slow_steps], "many": users[: settings.steps]}
        self.model = build_sharded(self._config, self._manifest, ranks).model
        self._optimizer = make_optimizer(self.model, self._config.train)
        self._scorer: Any = self.model.module.branches["main"].scorer
        self._steps = {
            "rows": self._batches("few", 1, apart=True),
            "1": self._batches("many", 1),
            "blocks": self._batches("many", cell.shape.requests),
        }

    def kinds(self) -> dict[Kind, tuple[Callable[[], Seconds], int]]:
        """For each kind the function that measures it, and the samples that it trains on."""
        bare = {name: partial(self._bare, steps) for name, steps in self._steps.items()}
        ours = {name: partial(self._ours, steps) for name, steps in self._steps.items()}
        few, many = (self.cell.shape.samples * len(self._users[name]) for name in ("few", "many"))
        known: dict[Kind, tuple[Callable[[], Seconds], int]] = {
            **{kind: (self._plain(kind == "published"), few) for kind in _SLOW if kind in self.cell.kinds},
            "plain attention": (self._plain_attention, few),
            "rows": (bare["rows"], few),
            "bare, 1": (bare["1"], many),
            "ours, 1": (ours["1"], many),
            "bare, blocks": (bare["blocks"], many),
            "ours, blocks": (ours["blocks"], many),
        }
        return {kind: known[kind] for kind in self.cell.kinds}

    def facts(self, kind: Kind) -> dict[str, float]:
        """Behaviors looked up for a sample, and the share of different items, in a kind's batches."""
        layout = kind.rsplit(", ", 1)[-1] if ", " in kind else "rows"
        steps = self._steps[layout]
        return {
            f"behaviors a sample, {layout}": steps[0].batch.behaviors / self.cell.shape.samples,
            f"different items, {layout}": zipf_share([step.batch for step in steps]),
        }

    def _batches(self, users: str, requests: int, apart: bool = False) -> list[Step]:
        chosen = [row_per_sample(rows) if apart else rows for rows in self._users[users]]
        data = self._config.data
        return [Step(as_batch(rows, self._manifest, data, requests), True, Cursor()) for rows in chosen]

    def _bare(self, steps: Sequence[Step]) -> Seconds:
        return bare_loop(self.model, self._optimizer, steps, self._ranks)

    def _ours(self, steps: Sequence[Step]) -> Seconds:
        return trainer_loop(self._config, self.model, steps, self._ranks, self._folder)

    def _plain_attention(self) -> Seconds:
        branch = self.model.module.branches["main"]
        assert isinstance(self._scorer, MlpScorer)
        branch.scorer = PlainMlpScorer(self._scorer)
        try:
            return self._bare(self._steps["rows"])
        finally:
            branch.scorer = self._scorer

    def _plain(self, published: bool) -> Callable[[], Seconds]:
        rows = {name: info.rows for name, info in self._manifest.features.items()}
        model = PlainDare(rows, self.cell.dim, self.cell.length, self._config.model.k, published=published)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        batches = [_plain_batch(rows, self.cell.length) for rows in self._users["few"]]

        def work() -> None:
            for history, target, labels in batches:
                optimizer.zero_grad()
                plain_loss(model(history, target), labels).backward()
                optimizer.step()

        return partial(seconds_of, work)


def _plain_batch(rows: UserRows, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    history, target = padded(rows, length)
    return torch.from_numpy(history), torch.from_numpy(target), torch.from_numpy(rows.labels)


def _measure_cell(loops: _Cell, settings: StepBench, repeats: int, report: Report) -> None:
    """Add the cell's rows and ratios to the report."""
    kinds, samples = loops.kinds(), loops.cell.shape.samples
    most = dict.fromkeys(_SLOW, settings.slow_repeats)
    taken = rounds({kind: measure for kind, (measure, _) in kinds.items()}, repeats, most=most)
    rates = {kind: [kinds[kind][1] / seconds.cpu for seconds in each] for kind, each in taken.items()}
    rows: list[Row] = []
    for kind, each in rates.items():
        rate = spread(each, "samples_per_cpu_s")
        rows.append(
            {
                "cell": loops.cell.name,
                "name": NAMES[kind],
                "samples_a_step": samples,
                **rate,
                "cpu_ms_a_step": 1e3 * samples / rate["samples_per_cpu_s"],
                **loops.facts(kind),
            }
        )
    shown = [{**row, "behaviors": next(row[key] for key in row if key.startswith("beh"))} for row in rows]
    report.table({loops.cell.name: "{name}", **CELL_COLUMNS}, shown)
    report.rows += rows
    for name, over, under in _RATIOS:
        if over in rates and under in rates:
            report.ratio(f"{loops.cell.name}: {name}", rates[over], rates[under], shown=name)
    report.line()
