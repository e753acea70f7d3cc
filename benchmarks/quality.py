"""`tandemrec bench quality`: samples and seconds to a fixed AUC, for blocks of one and of several requests.

A block shares its history among its requests, so it is cheaper; but a batch of few blocks knows few users,
and its gradient is noisier. Whether the one outweighs the other is what this measures.
"""

from __future__ import annotations

import io
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt

from benchmarks.loops import Unsaved, one_thread
from benchmarks.report import provenance, required, write_report
from pipelines.console import quiet_third_parties, table_lines
from trainer.assemble import build_sharded, feature_rows
from trainer.checkpoint.save_load import ResumePoint
from trainer.config.toml import Settings, load_settings
from trainer.data.prefetch import Closable
from trainer.data.reader import Cursor, SequenceLogReader, Step
from trainer.log.schema import read_manifest
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import Config, load_config
from trainer.run_folder import RunFolder

_PREFIX = "quality."


class QualityBench(Settings):
    """What is measured; given as `--set quality.KEY=VALUE`.

    Attributes:
        target: validation AUC to reach, fixed in advance.
        blocks: requests of a block, one row each; all other settings stay.
        every: steps between two looks at the validation split, and so the resolution of the answer.
        most_steps: a run that has not got there by then has failed.
        candidates: of the validation split's beginning, at least so many are scored at each look.
        seed: of the first repeat, counted up by one for each further one.
    """

    target: float = Field(0.76, gt=0.5, lt=1)
    blocks: tuple[PositiveInt, ...] = (1, 4, 19)
    every: PositiveInt = 20
    most_steps: PositiveInt = 400
    candidates: PositiveInt = 30_000
    seed: int = Field(17, ge=0)


@one_thread()
def bench_quality(config: Path | None, overrides: Sequence[str], repeats: int, report: Path | None) -> None:
    """Train from scratch with blocks of each size, on one rank and one thread, until the target is reached.

    Seconds are of training steps alone, reading included and validation not. A ratio compares the processor
    seconds of a block size with those of the first one, by medians over the seeds.
    """
    quiet_third_parties()
    own = [words.removeprefix(_PREFIX) for words in overrides if words.startswith(_PREFIX)]
    settings = load_settings(QualityBench, None, own)
    base = load_config(required(config), [words for words in overrides if not words.startswith(_PREFIX)])
    rows = []
    with process_group(device=base.train.device) as ranks:
        for seed in range(settings.seed, settings.seed + repeats):
            rows += [_until(base, settings, blocks, seed, ranks) for blocks in settings.blocks]
    ratios = _ratios(rows, settings.blocks)
    _print(rows, ratios, settings)
    print("\n".join(provenance(settings.seed, repeats)))
    if report is not None:
        write_report(report, rows, ratios, settings.model_dump(mode="json"))


def _until(base: Config, settings: QualityBench, blocks: int, seed: int, ranks: Ranks) -> dict[str, Any]:
    """One run; its figures at the first look that saw the target, or at its end."""
    data = base.data.model_copy(update={"requests_per_block": blocks})
    every = {"validate_every": settings.every, "log_every": settings.every}
    length = {"seed": seed, "max_steps": settings.most_steps, "epochs": 99}
    train = base.train.model_copy(update={**length, **every})
    checkpoint = base.checkpoint.model_copy(update={"every_steps": 0, "every_minutes": 0.0})
    config = base.model_copy(update={"data": data, "train": train, "checkpoint": checkpoint})
    manifest = read_manifest(config.data.log)
    sharded = build_sharded(config, manifest, ranks, training=True)
    rows = feature_rows(sharded.groups)
    reader = SequenceLogReader(config.data, "train", rows, seed=seed)
    # The looks are all alike, whatever the blocks.
    validation = _Beginning(base, rows, settings.candidates)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        run = RunFolder(Path(folder))
        trainer = _Stopping(config, sharded.model, reader, validation, ranks, run, lambda _: None, "", {})
        trainer.after_step = lambda _: trainer.stop_at(settings.target)
        trainer.run(ResumePoint(None, {}, []))
    found, at = trainer.metrics_of_validation, trainer.at
    assert found is not None
    auc = next(iter(found.values())).auc
    return {
        "blocks": blocks,
        "seed": seed,
        "reached": auc >= settings.target,
        "auc": auc,
        "steps": at.step,
        "samples": at.candidates,
        "wall_s": at.wall_s,
        "cpu_s": at.cpu_s,
    }


class _Stopping(Unsaved):
    """Ends at a target."""

    def stop_at(self, target: float) -> None:
        seen = self.metrics_of_validation
        self.stopped = seen is not None and next(iter(seen.values())).auc >= target


class _Beginning(SequenceLogReader):
    """The first steps of the validation split, held in memory."""

    def __init__(self, config: Config, rows: dict[str, int], candidates: int) -> None:
        super().__init__(config.data, "validation", rows)
        self._kept: list[Step] = []
        with closing(super().steps()) as read:
            for step in read:
                self._kept.append(step)
                candidates -= step.batch.candidates
                if candidates <= 0:
                    break

    def steps(self, cursor: Cursor | None = None) -> Closable[Step]:
        return (step for step in self._kept)


def _ratios(rows: Sequence[dict[str, Any]], blocks: Sequence[int]) -> dict[str, float]:
    """Processor seconds and samples to the target, of every block size over those of the first."""
    middle = {
        (size, what): statistics.median(row[what] for row in rows if row["blocks"] == size)
        for size in blocks
        for what in ("cpu_s", "samples")
    }
    return {
        f"{what}_{size}_to_{blocks[0]}": middle[size, what] / middle[blocks[0], what]
        for size in blocks[1:]
        for what in ("cpu_s", "samples")
    }


def _print(rows: Sequence[dict[str, Any]], ratios: dict[str, float], settings: QualityBench) -> None:
    cells = []
    for size in settings.blocks:
        some = [row for row in rows if row["blocks"] == size]
        reached = sum(row["reached"] for row in some)
        spread = []
        for what, form in (("samples", ",.0f"), ("cpu_s", ".1f"), ("wall_s", ".1f")):
            each = sorted(row[what] for row in some)
            middle = format(statistics.median(each), form)
            spread += [middle, f"{format(each[0], form)}-{format(each[-1], form)}"]
        cells.append([str(size), f"{reached} of {len(some)}", *spread])
    head = ["requests a block", "reached", "samples", "min-max", "CPU s", "min-max", "wall s", "min-max"]
    print(f"medians until validation AUC {settings.target}, a look every {settings.every} steps")
    print("\n".join(table_lines(head, cells)))
    for name, value in ratios.items():
        print(f"{name}: {value:.2f}")
