"""Reading a sequence log into batches, beside bare pyarrow decoding of the same columns and a training step

Each way reads the whole train split once a round, on one thread plus what the config asks for. Processor
seconds of all threads stand beside those of the wall, because other work on the machine disturbs them less.
The peak of resident memory is that of a first reading as configured, before anything else was done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import pyarrow.parquet as pq
import torch

from benchmarks.harness.loops import first_steps
from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import Seconds, one_thread, own_peak_bytes, rounds, seconds_of, spread
from benchmarks.inputs.tables import initialise_unsharded
from trainer.assemble import build_trainable, feature_rows
from trainer.config.sections import DataConfig
from trainer.config.tasks import resolve_tasks
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import read_manifest
from trainer.objectives.bce import loss_sum
from trainer.run_config import Config, load_config

COLUMNS = {
    "": "{name}",
    "median s": "{seconds:.2f}",
    "min-max": "{min:.2f}-{max:.2f}",
    "processor s": "{cpu_seconds:.2f}",
    "behaviors/s": "{behaviors_per_s:,.0f}",
    "candidates/s": "{candidates_per_s:,.0f}",
}
BARE, CHECKED, PLAIN, CONFIGURED = (
    "pyarrow, no checksums",
    "pyarrow, page checksums",
    "reader, no threads",
    "reader, as configured",
)


def main(words: Sequence[str]) -> None:
    given = Options("reader", __doc__).measuring(config=True).read(words)
    settings = load_config(given.config, given.overrides)
    report = Report(given, "Reading", seed=1)
    before = own_peak_bytes() / 2**20
    _read(settings.data)
    memory = {"peak_rss_before_mb": before, "peak_rss_reading_mb": own_peak_bytes() / 2**20}
    bare, counts = _Bare(settings.data), dict[str, tuple[int, int]]()
    kinds: dict[str, Callable[[], tuple[int, int]]] = {
        BARE: partial(bare.decode, verify=False),
        CHECKED: partial(bare.decode, verify=True),
        PLAIN: partial(_read, settings.data, workers=0, prefetch=0),
        CONFIGURED: partial(_read, settings.data),
    }

    def measure(name: str) -> Seconds:
        return seconds_of(lambda: counts.update({name: kinds[name]()}))

    taken = rounds({name: partial(measure, name) for name in kinds}, given.repeats, warm=0)
    behaviors, candidates = counts[PLAIN]
    step = _step_seconds(settings)
    taken["training step, one thread"] = [Seconds(step.wall * candidates, step.cpu * candidates)]
    report.rows = [_row(name, seconds, behaviors, candidates) for name, seconds in taken.items()]
    report.table(COLUMNS, report.rows)
    report.line("behaviors/s counts what batches hold: a history once for every block that sees it")
    wall, cpu = ({name: median(s[clock] for s in taken[name]) for name in kinds} for clock in (0, 1))
    report.ratios = {
        "reader_to_pyarrow": wall[CHECKED] / wall[PLAIN],
        "reader_to_pyarrow_cpu": cpu[CHECKED] / cpu[PLAIN],
        "threaded_reader_to_pyarrow": wall[CHECKED] / wall[CONFIGURED],
        "checksum_cost": wall[CHECKED] / wall[BARE] - 1,
        "reader_to_step": step.wall * candidates / wall[CONFIGURED],
    }
    report.facts = {
        "stored_behaviors": counts[CHECKED][0],
        "read_behaviors": behaviors,
        "candidates": candidates,
        **memory,
    }
    report.show_ratios(2)
    for name, value in report.facts.items():
        report.line(f"{name}: {value:,.2f}")
    report.close()


class _Bare:
    """What pyarrow alone needs for the columns that the reader reads."""

    def __init__(self, data: DataConfig) -> None:
        reader = SequenceLogReader(data, "train", None)
        self.places, self.names = reader.row_groups, reader.columns.names()

    def decode(self, verify: bool) -> tuple[int, int]:
        behaviors = candidates = 0
        for place in self.places:
            with pq.ParquetFile(place.file, page_checksum_verification=verify) as parquet:
                table = parquet.read_row_group(place.row_group, columns=self.names, use_threads=False)
            behaviors += sum(len(chunk.values) for chunk in table.column("history_timestamp").chunks)
            candidates += table.num_rows
        return behaviors, candidates


def _read(data: DataConfig, **changes: int) -> tuple[int, int]:
    reader = SequenceLogReader(data.model_copy(update=changes), "train", None, seed=1)
    behaviors = candidates = 0
    for step in reader.steps():
        behaviors += step.batch.behaviors
        candidates += step.batch.candidates
    return behaviors, candidates


@one_thread()
def _step_seconds(config: Config, steps: int = 30) -> Seconds:
    """What a candidate costs in forward, backward and fused update, on one thread.

    Several OpenMP threads wait for each other by spinning, which on a machine that others use too measures
    their load rather than the step.
    """
    manifest = read_manifest(config.data.log)
    model, groups = build_trainable(config, manifest, torch.device("cpu"))
    initialise_unsharded(model, groups, config.train.seed)
    tasks = resolve_tasks(config.tasks, manifest.tasks)
    reader = SequenceLogReader(config.data, "train", feature_rows(groups), tasks=tasks, seed=1)
    batches = [step.batch for step in first_steps(reader, lambda held: len(held) == steps).all]
    warm, measured = batches[:5], batches[5:] or batches
    for batch in warm:
        loss_sum(model(batch).logits, batch.labels, batch.weight).backward()

    def train() -> None:
        for batch in measured:
            loss_sum(model(batch).logits, batch.labels, batch.weight).backward()

    seconds, candidates = seconds_of(train), sum(batch.candidates for batch in measured)
    return Seconds(seconds.wall / candidates, seconds.cpu / candidates)


def _row(name: str, taken: Sequence[Seconds], behaviors: int, candidates: int) -> Row:
    wall = spread([seconds.wall for seconds in taken], "seconds")
    return {
        "name": name,
        **wall,
        "cpu_seconds": median(seconds.cpu for seconds in taken),
        "behaviors_per_s": behaviors / wall["seconds"],
        "candidates_per_s": candidates / wall["seconds"],
    }
