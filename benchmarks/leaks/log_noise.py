"""Noise in a sequence log, at and after a request of each row."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.leaks.views import Key, Selection, batches_of, same_batch, views
from trainer.config.sections import DataConfig
from trainer.log.schema import FeatureInfo, LogManifest, read_manifest, schema_of
from trainer.log.writer import write_manifest, write_split

Row = dict[str, Any]
LAYOUT = (64, 64 * 64)


@dataclass
class LogComparison:
    """Counts of a comparison; `examples` names the first requests that differ."""

    requests: int = 0
    replaced: int = 0
    differ: int = 0
    batches: int = 0
    batches_differ: int = 0
    examples: list[Key] = field(default_factory=list)


@dataclass(frozen=True)
class Noise:
    """Noise in the rows of a log. A row gets the same noise each time.

    Attributes:
        delay: the reader's ingestion delay; alone: rows hold the drawn request only.
        early: begin with the newest behavior that the request may see, and compare it alone (the control).
    """

    manifest: LogManifest
    seed: int
    delay: int
    alone: bool
    early: bool = False

    def pair(self, row: Row, number: int) -> tuple[Row, Row, list[Key], int] | None:
        """-> (row, row with noise, requests to compare, behaviors replaced); None if no event is to come."""
        rng = np.random.default_rng([self.seed, number])
        times, asked = row["history_timestamp"], row["request_timestamp"]
        fit = [r for r, time in enumerate(asked) if times and times[-1] >= time - self.delay]
        if self.early:
            fit = [r for r in fit if bisect_left(times, asked[r] - self.delay) > 0]
        if not fit:
            return None
        drawn = fit[rng.integers(len(fit))]
        cut = asked[drawn] - self.delay
        if self.early:
            cut = times[bisect_left(times, cut) - 1]
        if self.alone:
            row = only_request(row, drawn)
            drawn = 0
        keys = [
            (row["user_id"], name)
            for name, time in zip(row["request_id"], row["request_timestamp"], strict=True)
            if time <= row["request_timestamp"][drawn]
        ]
        if self.early:
            keys = [(row["user_id"], row["request_id"][drawn])]
        noisy = self._with_noise(row, cut, row["request_timestamp"][drawn], rng)
        return row, noisy, keys, len(times) - bisect_left(times, cut)

    def _with_noise(self, row: Row, cut: int, now: int, rng: np.random.Generator) -> Row:
        times, asked = row["history_timestamp"], row["request_timestamp"]
        first = bisect_left(times, cut)
        count = len(times) - first
        span = max(times[-1], asked[-1]) - cut + 2
        new = {
            **row,
            "history_timestamp": times[:first] + np.sort(rng.integers(cut, cut + span, count)).tolist(),
        }
        for name, info in self.manifest.features.items():
            if info.of_behaviors:
                new[f"history_{name}"] = row[f"history_{name}"][:first] + _random_ids(info, count, rng)
            if info.of_candidates:
                new[f"candidate_{name}"] = [
                    old if time <= now else _random_ids(info, len(old), rng)
                    for old, time in zip(row[f"candidate_{name}"], asked, strict=True)
                ]
        for task in self.manifest.tasks:
            new[f"label_{task}"] = [
                old if time <= now else rng.integers(0, 2, len(old)).astype(float).tolist()
                for old, time in zip(row[f"label_{task}"], asked, strict=True)
            ]
        new["request_history_end"] = [
            end if time < cut else bisect_left(new["history_timestamp"], time)
            for end, time in zip(row["request_history_end"], asked, strict=True)
        ]
        return new


def only_request(row: Row, at: int) -> Row:
    """The row with only one of its requests."""
    per_request = ("request_", "candidate_", "context_", "numeric_", "label_", "weight")
    new = {name: [value[at]] if name.startswith(per_request) else value for name, value in row.items()}
    return {**new, "num_requests": 1, "num_candidates": row["request_num_candidates"][at]}


def _random_ids(info: FeatureInfo, count: int, rng: np.random.Generator) -> list[Any]:
    if not info.multi:
        found: list[Any] = rng.integers(0, info.rows, count).tolist()
        return found
    return [rng.integers(0, info.rows, int(n)).tolist() for n in rng.integers(0, 4, count)]


def stored_rows(log: Path, manifest: LogManifest, split: str, limit: int) -> Iterator[tuple[int, Row]]:
    """The first `limit` rows of a split, numbered."""
    number = 0
    for entry in manifest.splits[split].files:
        with pq.ParquetFile(log / entry.path) as parquet:
            for group in range(parquet.num_row_groups):
                if number >= limit:
                    return
                for row in parquet.read_row_group(group).slice(0, limit - number).to_pylist():
                    yield number, row
                    number += 1


def write_pair(log: Path, split: str, noise: Noise, limit: int, folder: Path) -> tuple[set[Key], int]:
    """Write folder/plain and folder/noisy; -> (requests to compare, behaviors replaced)."""
    schema, compared, replaced = schema_of(noise.manifest), set[Key](), 0

    def batches(which: int) -> Iterator[pa.RecordBatch]:
        nonlocal replaced
        for number, row in stored_rows(log, noise.manifest, split, limit):
            pair = noise.pair(row, number)
            if pair is not None:
                if which:
                    compared.update(pair[2])
                    replaced += pair[3]
                yield from pa.Table.from_pylist([pair[which]], schema=schema).to_batches()

    for which, name in enumerate(("plain", "noisy")):
        (folder / name).mkdir(parents=True)
        info = write_split(batches(which), folder / name, split, schema, LAYOUT)
        write_manifest(folder / name, noise.manifest.model_copy(update={"splits": {split: info}}))
    return compared, replaced


def compare_log(
    data: DataConfig, split: str, limit: int, folder: Path, early: bool = False, seed: int = 0
) -> LogComparison:
    """Noise at and after a request of each of the first `limit` rows, delivered alone and in shared blocks.

    Args:
        data: how the log `data.log` is read; folder: where the logs with noise are written.
        early: the control; its batches are expected to differ.
    """
    manifest, outcome = read_manifest(data.log), LogComparison()
    for alone in (True, False):
        noise = Noise(manifest, seed, data.ingestion_delay, alone, early)
        where = folder / ("alone" if alone else "together")
        compared, replaced = write_pair(data.log, split, noise, limit, where)
        plain, noisy = (data.model_copy(update={"log": where / name}) for name in ("plain", "noisy"))
        if alone:
            single = [at.model_copy(update={"batch_candidates": 1}) for at in (plain, noisy)]
            pairs = zip(*(batches_of(at, split) for at in single), strict=True)
            equal = [same_batch(a, b) for a, b in pairs]
            outcome.batches, outcome.batches_differ = len(equal), equal.count(False)
        one, other = views(plain, split, Selection()), views(noisy, split, Selection())
        wrong = sorted(key for key in compared if one[key] != other[key])
        outcome.requests += len(compared)
        outcome.replaced += replaced
        outcome.differ += len(wrong)
        outcome.examples += wrong[:3]
    return outcome
