"""What narrower tables and a narrower dense part cost and save, of one trained model (precision.md)

    tandemrec bench precision --run RUN --dir DIR [--requests 4000]

The run's newest checkpoint is exported in every pair of types. Scores, AUC and what the search keeps are held
against the trainer's, on requests of the split that `export` compares. Then the last request of some users of
the test split is scored one at a time, by all versions in turn, on one thread. "dense bf16": products of
matrices of the dense part in bfloat16, by torch's autocast, over tables in fp32.
"""

from __future__ import annotations

import json
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import one_thread
from embeddings.errors import SnapshotError
from embeddings.lookup.stored import WIDTHS, Dtype
from pipelines.export_parity import Parity, compare
from pipelines.export_version import ExportOptions, publish_version
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import LogManifest, read_manifest
from trainer.ranks.process_group import process_group
from trainer.run_folder import RunFolder
from trainer.serving.body import decode
from trainer.serving.request import Limits, Request
from trainer.serving.scorer import Scorer
from trainer.snapshot import Snapshot, load_snapshot
from trainer.snapshot.manifest import SnapshotManifest

_COLUMNS = {
    "representation": "{dtype}",
    "attention": "{attention}",
    "dense": "{dense}",
    "tables MB": "{tables_mb:.2f}",
    "largest": "{worst:.2g}",
    "mean": "{mean:.2g}",
    "AUC - trainer's": "{auc_change:+.6f}",
    "top K kept": "{overlap:.3%}",
    "p50 ms": "{p50_ms:.2f}",
    "CPU ms": "{cpu_ms:.2f}",
    "search CPU ms": "{search_cpu_ms:.2f}",
    "ranking CPU ms": "{ranking_cpu_ms:.2f}",
}


@dataclass(frozen=True)
class _Version:
    """One kind of tables and dense part: how it scores is in `row` already."""

    row: Row
    scorer: Scorer
    dense: str

    def narrowed(self) -> AbstractContextManager[Any]:
        bf16 = self.dense == "bf16"
        return torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext()


@one_thread()
def main(words: Sequence[str]) -> None:
    options = Options("precision", __doc__).measuring(repeats=3)
    options.add_argument("--run", type=Path, required=True)
    options.add_argument("--requests", type=int, default=4_000, help="whose scores are compared")
    options.add_argument("--users", type=int, default=60, help="whose requests are timed")
    options.add_argument("--candidates", type=int, default=500, help="of a request that is timed")
    options.add_argument("--dir", type=Path, required=True, help="for the versions, which are removed")
    given = options.read(words)
    warnings.simplefilter("ignore")
    report = Report(given, "Precision", seed=0)
    with tempfile.TemporaryDirectory(dir=given.dir, prefix="bench-") as folder:
        versions = _versions(given, Path(folder), report)
        log = RunFolder(given.run).read_config().data.log
        requests = _requests(log, versions[0].scorer, given.users, given.candidates)
        _time(versions, requests, given.repeats)
    report.rows = [version.row for version in versions]
    report.facts["behaviors of a timed request"] = median(r.history.time.size for r in requests)
    behaviors = f"{report.facts['behaviors of a timed request']:,.0f} behaviors (median)"
    report.line(f"{len(requests)} requests of {given.candidates} candidates and {behaviors} were timed")
    report.table(_COLUMNS, report.rows)
    for name in ("p50_ms", "search_cpu_ms"):
        for row in report.rows[1:]:
            ratio = row[name] / report.rows[0][name]
            report.ratios[f"{name}: {row['dtype']}, {row['attention']}, dense {row['dense']}"] = ratio
    report.close()


def _versions(given: Namespace, folder: Path, report: Report) -> list[_Version]:
    """Every pair of types, the widest first; then the narrower dense part."""
    found = []
    with process_group() as ranks:
        for dtype in reversed(WIDTHS):
            for attention in reversed(WIDTHS):
                options = ExportOptions(dtype, attention, parity_requests=given.requests)
                try:
                    published = publish_version(given.run, folder, ranks, options)
                except SnapshotError as error:
                    report.line(f"{dtype}, attention {attention}: refused, {error}")
                    continue
                snapshot = load_snapshot(published.path)
                row = _row(dtype, attention, "fp32", published.manifest, published.parity)
                found.append(_Version(row, Scorer(snapshot), "fp32"))
    wide = found[0]
    parity = _of_narrow_dense(wide.scorer.snapshot, given.requests)
    row = _row("fp32", "fp32", "bf16", wide.scorer.snapshot.manifest, parity)
    return [*found, _Version(row, Scorer(load_snapshot(wide.scorer.snapshot.path)), "bf16")]


def _row(dtype: Dtype, attention: Dtype, dense: str, manifest: SnapshotManifest, parity: Parity) -> Row:
    before, after = next(iter(parity.tasks.values())).auc
    return {
        "dtype": dtype,
        "attention": attention,
        "dense": dense,
        "tables_mb": sum(each.bytes for each in manifest.files if each.path.startswith("tables/")) / 1e6,
        "worst": parity.worst,
        "mean": parity.mean,
        "auc": after,
        "auc_change": after - before,
        "overlap": min(parity.overlap.values(), default=1.0),
    }


class _Wide:
    """Stands in for the trainer: a version in fp32, whose scores are the trainer's bit for bit."""

    device = torch.device("cpu")

    def __init__(self, snapshot: Snapshot) -> None:
        self.score, self.search = snapshot.score, snapshot.search


class _Narrow(_Wide):
    """The same with matrix products in bfloat16."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(snapshot)
        self.manifest, score, search = snapshot.manifest, self.score, self.search

        def narrow(call: Any) -> Any:
            def called(batch: Any) -> Any:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    found = call(batch)
                return found.float() if isinstance(found, torch.Tensor) else found

            return called

        self.score, self.search = narrow(score), narrow(search)


def _of_narrow_dense(snapshot: Snapshot, limit: int) -> Parity:
    manifest = snapshot.manifest
    log = read_manifest(manifest.config.data.log)
    split = "validation" if log.splits.get("validation") else "train"
    reader = SequenceLogReader(manifest.config.data, split, snapshot.id_bounds())
    return compare(_Wide(snapshot), _Narrow(snapshot), reader, limit)  # type: ignore[arg-type]


def _requests(log: Path, scorer: Scorer, users: int, candidates: int) -> list[Request]:
    """The last request of users of the test split who have one, its candidates repeated up to so many."""
    manifest, found = read_manifest(log), list[Request]()
    limits = Limits()
    for file in sorted((log / "test").glob("*.parquet")):
        for row in pq.read_table(file).slice(0, 4 * users).to_pylist():
            if len(found) < users and row["num_requests"] and row["num_behaviors"]:
                content = json.dumps({"requests": [_body(manifest, row, candidates)]}).encode()
                found += decode(memoryview(content), "application/json", scorer, None, limits).requests
    return found


def _body(manifest: LogManifest, row: dict[str, Any], candidates: int) -> dict[str, Any]:
    def many(values: list[Any]) -> list[Any]:
        return (values * (candidates // len(values) + 1))[:candidates]

    sides = {name: info for name, info in manifest.features.items()}
    return {
        "history": {
            "timestamp": row["history_timestamp"],
            "features": {name: row[f"history_{name}"] for name, info in sides.items() if info.of_behaviors},
        },
        "time": row["request_timestamp"][-1],
        "candidates": {
            name: many(row[f"candidate_{name}"][-1]) for name, info in sides.items() if info.of_candidates
        },
        "context": {name: row[f"context_{name}"][-1] for name in manifest.context},
        "numeric": {name: many(row[f"numeric_{name}"][-1]) for name in manifest.numeric},
    }


def _time(versions: Sequence[_Version], requests: Sequence[Request], repeats: int) -> None:
    """Score every request by every version in turn, by both clocks; what was taken goes to the rows."""
    taken: dict[tuple[int, str], list[tuple[float, float]]] = {
        (number, clock): [] for number in range(len(versions)) for clock in ("wall", "cpu")
    }
    for turn in range(1 + repeats):
        for request in requests:
            for (number, clock), each in taken.items():
                version = versions[number]
                version.scorer.clock = time.perf_counter if clock == "wall" else time.thread_time
                with version.narrowed():
                    seconds = version.scorer.score([request])[1]
                if turn:  # the first warms up
                    each.append((seconds.search, seconds.ranking))
    for number, version in enumerate(versions):
        wall, cpu = (1e3 * np.array(taken[number, clock]) for clock in ("wall", "cpu"))
        version.row["p50_ms"] = float(np.median(wall.sum(1)))
        version.row["cpu_ms"] = float(np.median(cpu.sum(1)))
        version.row["search_cpu_ms"], version.row["ranking_cpu_ms"] = np.median(cpu, 0).tolist()
