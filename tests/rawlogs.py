"""Small raw tables for the tests of ingest, and its logs as plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.ingest_config import IngestConfig
from trainer.data.schema import read_manifest

DAY = 86_400
START = 1_483_228_800  # 2017-01-01
Row = dict[str, Any]
KINDS = {
    "category": pa.string(),
    "action": pa.string(),
    "tags": pa.list_(pa.string()),
    "city": pa.string(),
    "page": pa.string(),
    "slot": pa.string(),
    "click": pa.int64(),
    "buy": pa.bool_(),
    "price": pa.float64(),
    "importance": pa.float64(),
}
EVENT = ("user_id", "item_id", "timestamp", "category", "action", "tags", "city")
SHOWN = ("user_id", "request", "item_id", "timestamp", "click", "buy", "price", "importance", "page", "slot")


def write(path: Path, rows: Sequence[Row], names: Sequence[str] = EVENT) -> Path:
    columns = {name: pa.array([row[name] for row in rows], KINDS.get(name, pa.int64())) for name in names}
    pq.write_table(pa.table(columns), path)
    return path


def events(seed: int = 0, users: int = 6, per_user: int = 20, items: int = 30, days: int = 10) -> list[Row]:
    """Events with ties in time, exact repetitions, nulls, and empty and missing tag lists."""
    random = Random(seed)
    found: list[Row] = []
    for user in range(1, users + 1):
        for _ in range(random.randint(per_user // 2, per_user)):
            item = random.randint(1, items)
            event = {
                "user_id": user,
                "item_id": item + 1000,
                "timestamp": START + random.randrange(days) * DAY + random.randrange(3),
                "category": None if item % 5 == 0 else f"c{item % 4}",
                "action": random.choice(["view", "buy", None]),
                "tags": random.choice([None, [], ["x"], ["y", "x", "y"], ["z", None]]),
                "city": random.choice(["Rome", "Oslo", None]),
            }
            found += [event] * random.choice([1, 1, 1, 2])
    random.shuffle(found)
    return found


def impressions(seed: int = 0, users: int = 7, requests: int = 6, items: int = 34) -> list[Row]:
    """Requests of known and unknown users, at and between event times, with items that nobody had."""
    random = Random(seed)
    found: list[Row] = []
    for user in range(1, users + 1):
        for request in range(requests):
            time, page = START + random.randrange(10) * DAY + random.randrange(4), random.choice(["p", None])
            for item in random.sample(range(1, items + 1), random.randint(1, 4)):
                found.append(
                    {
                        "user_id": user,
                        "request": request,
                        "item_id": item + 1000,
                        "timestamp": time,
                        "click": random.randint(0, 1),
                        "buy": random.random() < 0.3,
                        "price": random.randrange(100) / 4,
                        "importance": random.choice([0.5, 1.0]),
                        "page": page,
                        "slot": random.choice(["top", "side", None]),
                    }
                )
    random.shuffle(found)
    return found


def config(protocol: str, **changes: Any) -> IngestConfig:
    tree: dict[str, Any] = {
        "protocol": protocol,
        "task": "click",
        "events": {"taxonomy": ["category"]},
        "features": [{"name": "action", "side": "history"}, {"name": "tags", "multi": True}],
        "context": [{"name": "city", "table": "events"}],
        "requests": {"negatives": 2, "min_history": 1},
        "split": {"validation": "2017-01-06", "test": "2017-01-09"},
        "files": {"rows_per_group": 4, "rows_per_file": 8},
        "engine": {"threads": 2, "memory_limit": "500MB"},
    }
    if protocol == "impressions":
        tree["features"].append({"name": "slot", "side": "candidate"})
        tree["context"].append({"name": "page"})
        tree["impressions"] = {
            "request": "request",
            "labels": {"click": "click", "buy": "buy"},
            "weight": "importance",
            "numeric": ["price"],
        }
    if protocol == "leave-last":
        tree["requests"] |= {"min_events": 12, "distances": [3, 8]}
        del tree["split"]
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return IngestConfig.model_validate(tree)


def rows(log: Path, split: str | None = None) -> list[Row]:
    manifest = read_manifest(log)
    chosen = manifest.splits.values() if split is None else [manifest.splits[split]]
    files = [file for info in chosen for file in info.files]
    return [row for file in files for row in pq.read_table(log / file.path).to_pylist()]


def words(log: Path, feature: str) -> dict[Any, int]:
    table = pq.read_table(log / "vocab" / f"{feature}.parquet").to_pydict()
    return dict(zip(table["value"], table["id"], strict=True))


def domains(seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Events of two domains with the same users and the same item numbers."""
    random = Random(seed)

    def one(action: str, scenes: list[str | None]) -> Row:
        return {
            "uid": random.randint(1, 3),
            "thing": random.randint(1, 5),
            "ts": START + random.randrange(10) * DAY + random.randrange(2),
            "do": action,
            "scene": random.choice(scenes),
            "kind": random.choice([1, 2, 3, None]),
            "dwell": random.randint(0, 2),
        }

    ads = [one(random.choice(["click", "lead"]), ["feed", None]) for _ in range(25)]
    content = [one(random.choice(["click", "finish"]), ["feed", "video"]) for _ in range(60)]
    return ads, content
