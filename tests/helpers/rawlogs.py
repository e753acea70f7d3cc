"""Small raw tables for the tests of ingest, and its logs as plain Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.ingest import ingest
from trainer.log.hashed_ids import hash_text
from trainer.log.schema import LogManifest, read_manifest

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
PARTIAL = {"click": "click", "buy": {"column": "buy", "partial": True, "weight": "worth"}}
BEHAVIOR = ("item_id", "category_id", "action", "tags", "timestamp")
SHOWN = ("user_id", "request", "item_id", "timestamp", "click", "buy", "price", "importance", "page", "slot")


def write(path: Path, rows: Sequence[Row], names: Sequence[str] = EVENT) -> Path:
    columns = {name: pa.array([row[name] for row in rows], KINDS.get(name, pa.int64())) for name in names}
    pq.write_table(pa.table(columns), path)
    return path


def as_parquet(path: Path, rows: Sequence[Row], names: Sequence[str]) -> Path:
    """Some columns of the rows, of the types that their values have."""
    pq.write_table(pa.table({name: [row[name] for row in rows] for name in names}), path)
    return path


def events(seed: int = 0, users: int = 6, per_user: int = 20, items: int = 30, days: int = 10) -> list[Row]:
    """Events with ties in time, exact repetitions, nulls, and empty and missing tag lists.

    Half of the items change their category after day 4, and every third one lacks it now and then.
    """
    random = Random(seed)
    found: list[Row] = []
    for user in range(1, users + 1):
        for _ in range(random.randint(per_user // 2, per_user)):
            item = random.randint(1, items)
            day, second = random.randrange(days), random.randrange(3)
            lacking = item % 5 == 0 or (item % 3 == 0 and second == 2)
            event = {
                "user_id": user,
                "item_id": item + 1000,
                "timestamp": START + day * DAY + second,
                "category": None if lacking else f"c{(item + item % 2 * (day > 4)) % 4}",
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


def partly_known() -> list[Row]:
    """For the labels `PARTIAL`: a third of the rows has no `buy`, null or NaN, and some are there twice."""
    unknown = [None, float("nan")]
    shown = [
        {**row, "buy": float(row["buy"]) if place % 3 else unknown[place % 2], "worth": place % 5 / 2}
        for place, row in enumerate(impressions())
    ]
    for row in shown:
        if row["buy"] is None:
            row["worth"] = None
    # The same item twice in a request: once with its label and once without.
    return shown + [{**row, "buy": None if place % 2 else row["buy"]} for place, row in enumerate(shown[:8])]


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


def ids_of_values(log: Path, feature: str) -> dict[Any, int]:
    """Raw value -> id, of a feature's vocabulary (of `user_id` and `request_id` too)."""
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


class Log:
    """An ingested log, and the raw tables in its ids.

    `renewed`: half of the raw rows have items, categories, tags, ... that the others never have.
    `shift`: is added to all items.
    """

    def __init__(
        self, folder: Path, protocol: str, seed: int, *, renewed: bool = False, shift: int = 0, **changes: Any
    ) -> None:
        self.config = config(protocol, **changes)
        self.folder = folder / "log"
        raw = events(seed, users=4, per_user=16, items=20)
        shown = impressions(seed, users=5, items=24) if protocol == "impressions" else None
        if renewed:
            raw, shown = renew(raw), shown and renew(shown)
        raw, shown = (
            rows and [{**row, "item_id": row["item_id"] + shift} for row in rows] for rows in (raw, shown)
        )
        self.raw, self.raw_shown = raw, shown or []
        source = write(folder / "events.parquet", raw)
        given = write(folder / "shown.parquet", shown, SHOWN) if shown else None
        self.manifest: LogManifest = ingest(
            source, self.folder, self.config, impressions=given, overwrite=True
        )
        names = [*self.manifest.features, *(f"context_{name}" for name in self.manifest.context)]
        self.ids = {name: self._ids_of(name) for name in names}
        self.events = [self.encode(row) for row in raw]
        self.shown = [self.encode(row) for row in shown or []]
        self.rows = rows(self.folder)

    def _ids_of(self, name: str) -> dict[Any, int]:
        info = (self.manifest.features | self.manifest.context)[name.removeprefix("context_")]
        if not info.raw:
            return ids_of_values(self.folder, name)
        column = "category" if name == "category_id" else name.removeprefix("context_")
        cells = [row.get(column) for row in [*self.raw, *self.raw_shown]]
        values = [one for cell in cells for one in (cell if isinstance(cell, list) else [cell])]
        given = list({one for one in values if one is not None})
        return dict(zip(given, hash_text(given).tolist() if info.hashed else given, strict=True))

    def encode(self, row: Row) -> Row:
        coded = {**row, "category_id": row.get("category"), "context_city": row.get("city")}
        coded["context_page"] = row.get("page")
        for name, ids in self.ids.items():
            value = coded.get(name)
            multi = name == "tags"
            coded[name] = (
                sorted({ids[one] for one in value or [] if one in ids}) if multi else ids.get(value, 0)
            )
        return coded

    def before(self, user: int, time: int) -> list[Row]:
        return [event for event in self.events if event["user_id"] == user and event["timestamp"] < time]

    def requests(self) -> dict[tuple[int, int], Row]:
        """(user, request id) -> the request's values, its visible history among them."""
        found = {}
        names = read_manifest(self.folder).features
        kept = {f"candidate_{name}" for name in names}
        for row in self.rows:
            history = list(zip(*(row[f"history_{name}"] for name in BEHAVIOR), strict=True))
            lists = [key for key in row if key.startswith(("request_", "context_", "label_", "numeric_"))]
            lists += [key for key in row if key == "weight" or key in kept]
            for place, request in enumerate(row["request_id"]):
                one = {key: row[key][place] for key in lists}
                one["history"] = history[: one["request_history_end"]]
                assert (row["user_id"], request) not in found
                found[row["user_id"], request] = one
        return found

    def attribute(self, item: int, name: str, time: int) -> Any:
        """The item's one value, or the last known one before `time`; of a second the largest."""
        having = [event for event in self.events if event["item_id"] == item and event[name]]
        first = min((event["timestamp"] for event in self.events if event["item_id"] == item), default=0)
        always = any(event["timestamp"] == first for event in having)
        if always and all(event[name] == having[0][name] for event in having):
            return having[0][name]
        past = [(event["timestamp"], event[name]) for event in having if event["timestamp"] < time]
        return max(past)[1] if past else [] if name == "tags" else 0

    def check_histories(self) -> None:
        for (user, _), request in self.requests().items():
            past = self.before(user, request["request_timestamp"])
            times = [behavior[-1] for behavior in request["history"]]
            assert times == sorted(times) and request["request_num_candidates"] == len(request["label_click"])
            expected = Counter(frozen(tuple(event[name] for name in BEHAVIOR)) for event in past)
            kept = self.config.files.max_history
            found = Counter(map(frozen, request["history"]))
            assert found <= expected if kept else found == expected
            assert len(request["history"]) == (min(kept, len(past)) if kept else len(past))
            last = max(event["timestamp"] for event in past)
            assert times[-1] == last
            cities = [event["context_city"] for event in past if event["timestamp"] == last]
            assert request["context_city"] == max(cities)
            time = request["request_timestamp"]
            for place, item in enumerate(request["candidate_item_id"]):
                # An unknown item is one of several: tests of vocabularies look at their attributes.
                for name in ("category_id", "tags") if item else ():
                    assert request[f"candidate_{name}"][place] == self.attribute(item, name, time)


def frozen(behavior: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tuple(value) if isinstance(value, list) else value for value in behavior)


def renew(raw: Sequence[Row]) -> list[Row]:
    """Every second row with other values, some before and some after the others in their order."""
    new = {"c1": "b1", "c2": "d2", "view": "skip", "Oslo": "Bonn", "p": "a", "top": "mid"}

    def one(row: Row) -> Row:
        changed = {name: new.get(value, value) for name, value in row.items() if name != "tags"}
        tags = (
            {"tags": row["tags"] and [{"x": "w"}.get(tag, tag) for tag in row["tags"]]}
            if "tags" in row
            else {}
        )
        return {**changed, **tags, "item_id": row["item_id"] + (500 if row["item_id"] % 2 else -500)}

    return [one(row) if place % 2 else row for place, row in enumerate(raw)]
