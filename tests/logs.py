"""Small sequence logs for tests, written through the real writer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.log_writer import write_manifest, write_split
from trainer.data.schema import FeatureInfo, LogManifest, arrow_schema

FEATURES = {"item_id": 60, "category_id": 9}
INFOS = {name: FeatureInfo(rows=rows) for name, rows in FEATURES.items()}
Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """How large a log is: upper ends of uniform ranges."""

    users: int = 12
    behaviors: int = 40
    requests: int = 6
    candidates: int = 5


def random_row(rng: np.random.Generator, user: int, shape: Shape) -> Row:
    """One user block: ties in time, empty histories and requests without candidates included."""
    n = int(rng.integers(0, shape.behaviors + 1))
    times = np.sort(rng.integers(0, 3 * shape.behaviors, n))
    request_times = np.sort(rng.integers(0, 4 * shape.behaviors, int(rng.integers(1, shape.requests + 1))))
    counts = rng.integers(1, shape.candidates + 1, request_times.size)
    row: Row = {
        "user_id": user,
        "history_timestamp": times.tolist(),
        "request_id": (1000 * user + np.arange(request_times.size)).tolist(),
        "request_timestamp": request_times.tolist(),
        "request_history_end": np.searchsorted(times, request_times, side="left").tolist(),
        "request_num_candidates": counts.tolist(),
        "label_click": [rng.integers(0, 2, c).astype(np.float32).tolist() for c in counts],
        "num_behaviors": n,
        "num_requests": int(request_times.size),
        "num_candidates": int(counts.sum()),
    }
    for feature, rows in FEATURES.items():
        row[f"history_{feature}"] = rng.integers(0, rows, n).tolist()
        row[f"candidate_{feature}"] = [rng.integers(0, rows, c).tolist() for c in counts]
    return row


def random_rows(seed: int, shape: Shape = Shape()) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [random_row(rng, user, shape) for user in range(shape.users)]


def write_log(path: Path, splits: dict[str, list[Row]], layout: tuple[int, int] = (3, 6)) -> Path:
    """Write rows as a sequence log; `layout` is rows a group and rows a file."""
    schema = arrow_schema(INFOS, ["click"])
    path.mkdir(parents=True)
    (path / "vocab").mkdir()
    infos = {
        split: write_split(
            pa.Table.from_pylist(rows, schema=schema).to_batches(), path, split, schema, layout
        )
        for split, rows in splits.items()
    }
    manifest = LogManifest(
        features=INFOS,
        tasks=["click"],
        taxonomy=["category_id"],
        splits=infos,
        ingest={},
        report={},
    )
    write_manifest(path, manifest)
    items = pa.table({"value": np.arange(60), "id": np.arange(60), "count": np.arange(60) % 7})
    pq.write_table(items, path / "vocab" / "item_id.parquet")
    return path


def small_log(path: Path, seed: int = 0, users: int = 12) -> Path:
    """A log with all three splits."""
    rows = random_rows(seed, Shape(users=users))
    return write_log(path, {"train": rows, "validation": rows[: users // 2], "test": rows[users // 2 :]})
