"""Vectors of all items of a log, and indexes over them: time, memory, recall against brute force

    tandemrec bench vectors --items 1000000 --dir DIR

Makes a log in which every item occurs, and a snapshot of `configs/dare.toml` whose item vectors lie around
centers, half of a vector being that of the item's category. Each row is a process of its own, so that its
peak of memory is its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import own_peak_bytes, seconds_of
from benchmarks.inputs.random_snapshot import RandomSource, write_snapshot
from pipelines.vectors.options import VectorOptions
from pipelines.vectors.vectors import write_vectors
from trainer.assemble import resolve_groups
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import FeatureInfo, LogManifest, read_manifest, schema_of
from trainer.log.writer import staged, write_manifest, write_split
from trainer.run_config import load_config
from trainer.sealed_folder import MANIFEST

_CATEGORIES, _CENTERS, _HISTORY, _CANDIDATES, _TEST_USERS = 1000, 5000, 1000, 20, 200
_BAND = 1 << 18
COLUMNS = {
    "rows": "{rows:,}",
    "index": "{index}",
    "seconds": "{seconds:.0f}",
    "cpu s": "{cpu_s:.0f}",
    "peak GB": "{peak_gb:.2f}",
    "on disk GB": "{disk_gb:.2f}",
    "setting": "{setting}",
    "recall@10": "{recall_10:.4f}",
    "recall@100": "{recall_100:.4f}",
}


@dataclass(frozen=True)
class _CenteredSource(RandomSource):
    """Rows of items around centers."""

    def rows(self, group: str, table: str) -> Iterator[tuple[int, Tensor]]:
        of_group = self.groups[group]
        (spec,) = (spec for spec in of_group.tables if of_group.table_name(spec) == table)
        center_CD = torch.randn(_CENTERS, spec.dim, generator=torch.Generator().manual_seed(1))
        for first in range(0, spec.rows, _BAND):
            count = min(_BAND, spec.rows - first)
            rng = torch.Generator().manual_seed(2 + first)
            center = torch.randint(_CENTERS, (count,), generator=rng)
            yield first, (center_CD[center] + 0.5 * torch.randn(count, spec.dim, generator=rng)) * 0.1


def _rows(items: int, users: range, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Users whose histories together hold every item, each with one request."""
    rng = np.random.default_rng(users.start)
    for user in users:
        ids = (user * _HISTORY + np.arange(_HISTORY)) % (items - 1) + 1
        candidates = rng.integers(1, items, _CANDIDATES)
        row = {
            "user_id": user,
            "history_item_id": ids,
            "history_category_id": ids % _CATEGORIES,
            "history_timestamp": np.arange(_HISTORY),
            "request_id": [user],
            "request_timestamp": [_HISTORY],
            "request_history_end": [_HISTORY],
            "request_num_candidates": [_CANDIDATES],
            "candidate_item_id": [candidates],
            "candidate_category_id": [candidates % _CATEGORIES],
            "label_click": [np.zeros(_CANDIDATES, dtype=np.float32)],
            "num_behaviors": _HISTORY,
            "num_requests": 1,
            "num_candidates": _CANDIDATES,
        }
        yield pa.RecordBatch.from_pylist([row], schema=schema)


def _make(items: int, folder: Path) -> None:
    """A log and a snapshot, unless they are there."""
    log = folder / "log"
    if not log.exists():
        features = {"item_id": FeatureInfo(rows=items), "category_id": FeatureInfo(rows=_CATEGORIES)}
        facts = {"tasks": ["click"], "taxonomy": [], "ingest": {}, "report": {}}
        manifest = LogManifest(features=features, splits={}, **facts)
        schema = schema_of(manifest)
        train, layout = -(-items // _HISTORY), (100, 2000)
        with staged(log, False) as part:
            users = {"train": range(train), "test": range(train, train + _TEST_USERS)}
            splits = {
                name: write_split(_rows(items, some, schema), part, name, schema, layout)
                for name, some in users.items()
            }
            write_manifest(part, manifest.model_copy(update={"splits": splits}))
    if not (folder / "snapshot").exists():
        words = [f"groups.{name}.dim=32" for name in ("attention", "representation")]
        config = load_config(Path("configs/dare.toml"), [f"data.log={log}", "data.prefetch=0", *words])
        groups = resolve_groups(config, read_manifest(log))
        reader = SequenceLogReader(config.data, "test", None)
        batch = next(iter(reader.steps())).batch
        write_snapshot(folder / "snapshot", _CenteredSource(config, groups), batch, "fp16")


def _measure(folder: Path, index: str) -> Row:
    """One row, in this process."""
    out = folder / f"vectors-{index}"
    options = VectorOptions(index=index, overwrite=True)  # type: ignore[arg-type]
    seconds = seconds_of(lambda: write_vectors(folder / "snapshot", folder / "log", out, options))
    manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    row: Row = {"rows": manifest["rows"], "index": index, "seconds": seconds.wall, "cpu_s": seconds.cpu}
    row |= {"peak_gb": own_peak_bytes() / 1e9, "disk_gb": sum(f.stat().st_size for f in out.iterdir()) / 1e9}
    if manifest["index"]:
        chosen = manifest["index"]["setting"]
        row["setting"] = ", ".join(f"{name} {value}" for name, value in chosen.items()) or "all rows"
        for each in manifest["index"]["recall"]:
            if each["setting"] == chosen:
                row[f"recall_{each['k']}"] = each["recall"]
    return row


def main(words: Sequence[str]) -> None:
    options = Options("vectors", __doc__)
    options.add_argument("--items", type=int, default=1_000_000)
    options.add_argument("--indexes", default="none,flat,ivf,hnsw")
    options.add_argument("--dir", type=Path, required=True)
    options.add_argument("--one", default="", help="measure this index alone, and print the row")
    given = options.read(words)
    if given.one:
        print(json.dumps(_measure(given.dir, given.one)))
        return
    _make(given.items, given.dir)
    report = Report(given, "Vectors and indexes", seed=1, n=1)
    for index in given.indexes.split(","):
        command = [sys.executable, "-m", "benchmarks", "vectors", "--dir", str(given.dir), "--one", index]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(done.stdout, file=sys.stderr)
        report.rows.append(json.loads(done.stdout.splitlines()[-1]))
    report.table(COLUMNS, report.rows)
    report.close()
