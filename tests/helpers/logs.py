"""Small sequence logs for tests, written through the real writer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.log.schema import FeatureInfo, LogManifest, schema_of
from trainer.log.writer import write_manifest, write_split

FEATURES = {"item_id": 60, "category_id": 9}
INFOS = {name: FeatureInfo(rows=rows) for name, rows in FEATURES.items()}
# Everything a log may have besides: tags of both sides, an action of behaviors only, a price band of
# candidates only, context of the request, a number and a weight of the candidate, two labels.
RICH = {
    **INFOS,
    "tags": FeatureInfo(rows=20, multi=True),
    "action": FeatureInfo(rows=4, side="history"),
    "band": FeatureInfo(rows=5, side="candidate"),
}
CONTEXT = {"city": FeatureInfo(rows=7), "segments": FeatureInfo(rows=11, multi=True)}
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


def enrich(rows: list[Row], seed: int) -> list[Row]:
    """The same rows with everything of RICH and CONTEXT."""
    rng = np.random.default_rng(seed)

    def ids(info: FeatureInfo, count: int) -> list[Any]:
        if not info.multi:
            return rng.integers(0, info.rows, count).tolist()
        return [rng.integers(0, info.rows, int(n)).tolist() for n in rng.integers(0, 4, count)]

    rich = []
    for row in rows:
        counts = row["request_num_candidates"]
        new = {**row, "label_buy": [rng.integers(0, 2, c).astype(np.float32).tolist() for c in counts]}
        new["weight"] = [rng.uniform(0, 2, c).astype(np.float32).tolist() for c in counts]
        new["numeric_price"] = [rng.normal(size=c).astype(np.float32).tolist() for c in counts]
        for name in ("tags", "action", "band"):
            if RICH[name].of_behaviors:
                new[f"history_{name}"] = ids(RICH[name], row["num_behaviors"])
            if RICH[name].of_candidates:
                new[f"candidate_{name}"] = [ids(RICH[name], c) for c in counts]
        new |= {f"context_{name}": ids(info, row["num_requests"]) for name, info in CONTEXT.items()}
        rich.append(new)
    return rich


# What `observed_in_part` makes of the labels of `enrich`, for `write_log`.
IN_PART: dict[str, Any] = {"partial": ["buy"], "label_weights": ["buy"]}


def observed_in_part(rows: list[Row], seed: int) -> list[Row]:
    """Rich rows whose label `buy` was observed for some candidates only, and has weights of its own."""
    rng = np.random.default_rng(seed)

    def part(labels: list[float]) -> list[float | None]:
        return [(label, None, math.nan)[int(rng.choice(3, p=(0.6, 0.2, 0.2)))] for label in labels]

    found = []
    for row in rows:
        weights = [
            rng.uniform(0, 2, count).astype(np.float32).tolist() for count in row["request_num_candidates"]
        ]
        found.append(
            {**row, "label_buy": [part(labels) for labels in row["label_buy"]], "weight_buy": weights}
        )
    return found


def manifest_of(rich: bool = False, **changes: Any) -> LogManifest:
    """What the manifest of `write_log` says before there are splits."""
    facts: dict[str, Any] = {
        "features": RICH if rich else INFOS,
        "context": CONTEXT if rich else {},
        "numeric": ["price"] if rich else [],
        "weighted": rich,
        "tasks": ["click", "buy"] if rich else ["click"],
        "taxonomy": ["category_id"],
        "splits": {},
        "ingest": {},
        "report": {},
    }
    return LogManifest(**facts | changes)


def write_log(
    path: Path,
    splits: dict[str, list[Row]],
    layout: tuple[int, int] = (3, 6),
    rich: bool = False,
    more: Mapping[str, int | FeatureInfo] | None = None,
    **facts: Any,
) -> Path:
    """Write rows as a sequence log.

    Args:
        layout: rows a group and rows a file; more: further features; facts: of the manifest.
    """
    extra = {
        name: FeatureInfo(rows=rows) if isinstance(rows, int) else rows for name, rows in (more or {}).items()
    }
    path.mkdir(parents=True)
    (path / "vocab").mkdir()
    manifest = manifest_of(rich, features={**(RICH if rich else INFOS), **extra}, **facts)
    schema = schema_of(manifest)
    infos = {
        split: write_split(
            pa.Table.from_pylist(rows, schema=schema).to_batches(), path, split, schema, layout
        )
        for split, rows in splits.items()
    }
    write_manifest(path, manifest.model_copy(update={"splits": infos}))
    items = pa.table({"value": np.arange(60), "id": np.arange(60), "count": np.arange(60) % 7})
    pq.write_table(items, path / "vocab" / "item_id.parquet")
    return path


def small_log(path: Path, seed: int = 0, users: int = 12) -> Path:
    """A log with all three splits."""
    rows = random_rows(seed, Shape(users=users))
    return write_log(path, {"train": rows, "validation": rows[: users // 2], "test": rows[users // 2 :]})
