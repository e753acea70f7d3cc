"""Samples and seconds to a fixed AUC, for blocks of one and of several requests

A block shares its history among its requests, so it is cheaper; but a batch of few blocks knows few users,
and its gradient is noisier. This measures which of the two outweighs the other. Models are trained from
scratch with blocks of each size, on one rank and one thread, until the target is reached. Seconds are of
training steps alone, reading included and validation not. A ratio compares the processor seconds of a block
size with those of the first one, by medians over the seeds. --repeats is the number of seeds.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median

from pydantic import Field, PositiveInt

from benchmarks.harness.loops import NonSavingTrainer, first_steps
from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import one_thread
from trainer.assemble import build_sharded, feature_rows
from trainer.checkpoint.save_load import ResumePoint
from trainer.config.tasks import Task, resolve_tasks
from trainer.config.toml import Settings, load_settings
from trainer.data.cursor import Cursor
from trainer.data.prefetch import Closable
from trainer.data.reader import SequenceLogReader, Step
from trainer.log.schema import read_manifest
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import Config, load_config
from trainer.run_folder import RunFolder

_PREFIX = "quality."


class QualityBench(Settings):
    """The settings of this benchmark, given as `--set quality.KEY=VALUE`.

    Attributes:
        target: validation AUC to reach, fixed in advance.
        blocks: requests of a block, one row each; all other settings stay.
        every: steps between two validations, which is the resolution of the answer.
        most_steps: a run that has not reached the target after so many steps has failed.
        candidates: each validation scores at least so many, from the beginning of the split.
        seed: of the first repeat; each further repeat has the next seed.
    """

    target: float = Field(0.76, gt=0.5, lt=1)
    blocks: tuple[PositiveInt, ...] = (1, 4, 19)
    every: PositiveInt = 20
    most_steps: PositiveInt = 400
    candidates: PositiveInt = 30_000
    seed: int = Field(17, ge=0)


@one_thread()
def main(words: Sequence[str]) -> None:
    given = Options("quality", __doc__).measuring(config=True).read(words)
    own = [word.removeprefix(_PREFIX) for word in given.overrides if word.startswith(_PREFIX)]
    settings = load_settings(QualityBench, None, own)
    base = load_config(given.config, [word for word in given.overrides if not word.startswith(_PREFIX)])
    report = Report(given, "Quality", seed=settings.seed)
    with process_group(device=base.train.device) as ranks:
        for seed in range(settings.seed, settings.seed + given.repeats):
            report.rows += [_until(base, settings, blocks, seed, ranks) for blocks in settings.blocks]
    report.ratios = _ratios(report.rows, settings.blocks)
    report.facts = settings.model_dump(mode="json")
    _show(report, settings)
    report.show_ratios(2)
    report.close()


def _until(base: Config, settings: QualityBench, blocks: int, seed: int, ranks: Ranks) -> Row:
    """Train one run; its figures are those at the first validation that reached the target, or at the end."""
    data = base.data.model_copy(update={"requests_per_block": blocks})
    every = {"validate_every": settings.every, "log_every": settings.every}
    length = {"seed": seed, "max_steps": settings.most_steps, "epochs": 99}
    train = base.train.model_copy(update={**length, **every})
    checkpoint = base.checkpoint.model_copy(update={"every_steps": 0, "every_minutes": 0.0})
    config = base.model_copy(update={"data": data, "train": train, "checkpoint": checkpoint})
    manifest = read_manifest(config.data.log)
    sharded = build_sharded(config, manifest, ranks, training=True)
    rows = feature_rows(sharded.groups)
    tasks = resolve_tasks(config.tasks, manifest.tasks)
    reader = SequenceLogReader(config.data, "train", rows, tasks=tasks, seed=seed)
    # The looks are all alike, whatever the blocks.
    validation = _Beginning(base, rows, tasks, settings.candidates)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        run = RunFolder(Path(folder))
        trainer = _TargetTrainer(
            config, sharded.model, reader, validation, ranks, run, lambda _: None, "", {}
        )
        trainer.after_step = lambda _: trainer.stop_at(settings.target)
        trainer.run(ResumePoint(None, {}, []))
    metrics, end = trainer.validation.newest, trainer.at
    assert metrics is not None
    auc = next(iter(metrics.tasks.values())).auc
    return {
        "blocks": blocks,
        "seed": seed,
        "reached": auc >= settings.target,
        "auc": auc,
        "steps": end.step,
        "samples": end.candidates,
        "wall_s": end.wall_s,
        "cpu_s": end.cpu_s,
    }


class _TargetTrainer(NonSavingTrainer):
    """A trainer that stops once validation has reached a target."""

    def stop_at(self, target: float) -> None:
        metrics = self.validation.newest
        self.stopped = metrics is not None and next(iter(metrics.tasks.values())).auc >= target


class _Beginning(SequenceLogReader):
    """The first steps of the validation split, held in memory."""

    def __init__(self, config: Config, rows: dict[str, int], tasks: Sequence[Task], candidates: int) -> None:
        super().__init__(config.data, "validation", rows, tasks=tasks)
        reader = SequenceLogReader(config.data, "validation", rows, tasks=tasks)
        held = first_steps(reader, lambda steps: sum(s.batch.candidates for s in steps) >= candidates)
        self._held = held.all

    def steps(self, cursor: Cursor | None = None) -> Closable[Step]:
        return (step for step in self._held)


def _ratios(rows: Sequence[Row], blocks: Sequence[int]) -> dict[str, float]:
    """Processor seconds and samples to the target, of every block size over those of the first."""
    middle = {
        (size, what): median(row[what] for row in rows if row["blocks"] == size)
        for size in blocks
        for what in ("cpu_s", "samples")
    }
    return {
        f"{what}_{size}_to_{blocks[0]}": middle[size, what] / middle[blocks[0], what]
        for size in blocks[1:]
        for what in ("cpu_s", "samples")
    }


def _show(report: Report, settings: QualityBench) -> None:
    cells = []
    for size in settings.blocks:
        runs = [row for row in report.rows if row["blocks"] == size]
        cells.append([str(size), f"{sum(row['reached'] for row in runs)} of {len(runs)}"])
        for what, form in (("samples", ",.0f"), ("cpu_s", ".1f"), ("wall_s", ".1f")):
            each = sorted(row[what] for row in runs)
            cells[-1] += [f"{median(each):{form}}", f"{each[0]:{form}}-{each[-1]:{form}}"]
    head = ["requests a block", "reached", "samples", "min-max", "CPU s", "min-max", "wall s", "min-max"]
    report.line(f"medians until validation AUC {settings.target}, a look every {settings.every} steps")
    report.cells(head, cells)
