"""`tandemrec bench`: measurements with their baseline in the same process; the ratio is the result."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from benchmarks.checkpoint import bench_checkpoint
from benchmarks.loops import one_thread, timed
from benchmarks.quality import bench_quality
from benchmarks.report import required, write_report
from benchmarks.scaling_cost import bench_scaling
from benchmarks.search import bench_search
from benchmarks.serve import bench_serve
from benchmarks.step import bench_step
from pipelines.console import quiet_third_parties, table_lines
from tests.helpers.tables import initialise_unsharded
from trainer.assemble import build_trainable, feature_rows
from trainer.config.sections import DataConfig
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import read_manifest
from trainer.objectives.bce import loss_sum
from trainer.run_config import Config, load_config
from trainer.run_folder import versions

Row = dict[str, Any]


def bench_reader(config: Path | None, overrides: Sequence[str], repeats: int, report: Path | None) -> None:
    """Parquet to RequestBatch, against bare pyarrow decoding of the same columns and against a training step.

    Rows are measured interleaved, `repeats` times over the whole train split; medians and spreads are
    printed, and `report` keeps them as JSON. Everything runs on one thread plus what the config asks for.
    Processor seconds of all threads are measured too: other work on the machine disturbs them less. The
    peak of resident memory is that of a first reading as configured, before anything else was done.
    """
    quiet_third_parties()
    settings = load_config(required(config), overrides)
    before = _peak_mb()
    _read(settings.data)
    memory = {"peak_rss_before_mb": before, "peak_rss_reading_mb": _peak_mb()}
    bare, plan = _Bare(settings.data), {}
    kinds: dict[str, Callable[[], tuple[int, int]]] = {
        "pyarrow, no checksums": lambda: bare.decode(verify=False),
        "pyarrow, page checksums": lambda: bare.decode(verify=True),
        "reader, no threads": lambda: _read(settings.data, workers=0, prefetch=0),
        "reader, as configured": lambda: _read(settings.data),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    cpu: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, run in kinds.items():
            started, started_cpu = time.perf_counter(), time.process_time()
            plan[name] = run()
            seconds[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - started_cpu)
    behaviors, candidates = plan["reader, no threads"]
    stored = plan["pyarrow, page checksums"][0]
    rows = [_row(name, seconds[name], cpu[name], behaviors, candidates) for name in kinds]
    step, step_cpu = _step_seconds(settings)
    rows.append(
        _row("training step, one thread", [step * candidates], [step_cpu * candidates], behaviors, candidates)
    )
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    middle_cpu = {name: statistics.median(values) for name, values in cpu.items()}
    ratios = {
        "reader_to_pyarrow": middle["pyarrow, page checksums"] / middle["reader, no threads"],
        "reader_to_pyarrow_cpu": middle_cpu["pyarrow, page checksums"] / middle_cpu["reader, no threads"],
        "threaded_reader_to_pyarrow": middle["pyarrow, page checksums"] / middle["reader, as configured"],
        "checksum_cost": middle["pyarrow, page checksums"] / middle["pyarrow, no checksums"] - 1,
        "reader_to_step": step * candidates / middle["reader, as configured"],
    }
    facts = {
        "stored_behaviors": stored,
        "read_behaviors": behaviors,
        "candidates": candidates,
        **memory,
    }
    _print(rows, ratios, facts, repeats)
    if report is not None:
        write_report(report, rows, ratios, facts)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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
def _step_seconds(config: Config, steps: int = 30) -> tuple[float, float]:
    """Seconds and processor seconds a candidate costs in forward, backward and fused update, on one thread.

    Several OpenMP threads wait for each other by spinning, which on a machine that others use too measures
    their load rather than the step.
    """
    manifest = read_manifest(config.data.log)
    model, groups = build_trainable(config, manifest, torch.device("cpu"))
    initialise_unsharded(model, groups, config.train.seed)
    reader = SequenceLogReader(config.data, "train", feature_rows(groups), seed=1)
    batches = []
    for step in reader.steps():
        batches.append(step.batch)
        if len(batches) == steps:
            break
    warm, measured = batches[:5], batches[5:] or batches
    for batch in warm:
        loss_sum(model(batch).logits, batch.labels, batch.weight).backward()

    def train() -> None:
        for batch in measured:
            loss_sum(model(batch).logits, batch.labels, batch.weight).backward()

    seconds, candidates = timed(train), sum(batch.candidates for batch in measured)
    return seconds.wall / candidates, seconds.cpu / candidates


def _row(name: str, seconds: list[float], cpu: list[float], behaviors: int, candidates: int) -> Row:
    middle = statistics.median(seconds)
    return {
        "name": name,
        "seconds": middle,
        "min": min(seconds),
        "max": max(seconds),
        "cpu_seconds": statistics.median(cpu),
        "behaviors_per_s": behaviors / middle,
        "candidates_per_s": candidates / middle,
    }


def _print(
    rows: Sequence[Row], ratios: Mapping[str, float], facts: Mapping[str, float], repeats: int
) -> None:
    cells = [
        [
            row["name"],
            f"{row['seconds']:.2f}",
            f"{row['min']:.2f}-{row['max']:.2f}",
            f"{row['cpu_seconds']:.2f}",
            f"{row['behaviors_per_s']:,.0f}",
            f"{row['candidates_per_s']:,.0f}",
        ]
        for row in rows
    ]
    head = [
        f"train split, n = {repeats}",
        "median s",
        "min-max",
        "processor s",
        "behaviors/s",
        "candidates/s",
    ]
    print("\n".join(table_lines(head, cells)))
    print("behaviors/s counts what batches hold: a history once for every block that sees it")
    for name, value in {**ratios, **facts}.items():
        print(f"{name}: {value:,.2f}")
    print("; ".join(f"{name} {version}" for name, version in versions().items()))


BENCHES = {
    "reader": bench_reader,
    "step": bench_step,
    "scaling": bench_scaling,
    "quality": bench_quality,
    "search": bench_search,
    "checkpoint": bench_checkpoint,
    "serve": bench_serve,
}
