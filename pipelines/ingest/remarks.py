"""What of the raw tables was not used, was there twice, or contradicts itself: counted, and said once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce
from typing import Any

from ibis.expr import types as ir

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.engine import Engine, count_rows
from pipelines.ingest.protocols.protocol import REQUEST, Tables
from trainer.log.schema import LogManifest

_DAY = 86_400


@dataclass(frozen=True)
class Span:
    """The first and the last second of a table."""

    first: int
    last: int

    @staticmethod
    def of(engine: Engine, table: ir.Table) -> Span:
        found = table.aggregate(first=table.timestamp.min(), end=table.timestamp.max())
        row = engine.rows(found)[0]
        return Span(int(row["first"]), int(row["end"]))

    def __str__(self) -> str:
        first, last = (
            datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%d %H:%M:%S")
            for second in (self.first, self.last)
        )
        return f"from {first} to {last} UTC"

    def has(self, day: str) -> bool:
        """Whether a day, as in the config, lies between the two."""
        first, last = (str(datetime.fromtimestamp(second, UTC).date()) for second in (self.first, self.last))
        return first <= day <= last


def unused_settings(config: IngestConfig) -> list[str]:
    """The settings that were given, though the protocol has no use for them."""
    protocol = config.protocol
    users: dict[str, tuple[str, ...]] = {
        "positives": ("next-basket",),
        "negatives": ("next-basket", "leave-last", "time-split"),
        "exclude": ("time-split",),
        "min_events": ("leave-last",),
        "distances": ("leave-last",),
    }
    given = config.requests.model_fields_set
    found = [f"requests.{name}" for name, known in users.items() if name in given and protocol not in known]
    if protocol == "impressions":
        found += ["task"] if "task" in config.model_fields_set else []
    elif "impressions" in config.model_fields_set:
        found.append("impressions")
    if "request" in config.events.model_fields_set and config.events.request and protocol != "next-basket":
        found.append("events.request")
    return found


def remarks(engine: Engine, tables: Tables, buckets: int, config: IngestConfig) -> dict[str, Any]:
    """Counts of rows that are there more than once, and of impressions that contradict one another."""
    found: Counter[str] = Counter()
    for bucket in range(buckets):
        part = tables.of_buckets(bucket, bucket + 1)
        events = part.events
        found["repeated_events"] += count_rows(engine, events) - count_rows(engine, events.distinct())
        if config.protocol == "next-basket" and config.events.request:
            found["baskets_longer_than_a_day"] += _long_baskets(engine, events)
        if part.shown is not None:
            found.update(_impressions(engine, part.shown, events, config))
    if tables.items is not None:
        found["items_that_the_item_table_lacks"] = _lacking(engine, tables.events, tables.items, "item_id")
    if tables.users is not None:
        asking = tables.events if tables.shown is None else tables.shown
        found["users_that_the_user_table_lacks"] = _lacking(engine, asking, tables.users, "user_id")
    if tables.shown is not None:
        had = tables.shown.anti_join(tables.events.select("item_id").distinct(), "item_id")
        found["impressions_of_items_without_events"] = count_rows(engine, had)
        labels = {task: (tables.shown[f"label_{task}"] >= 0.5).cast("int64").sum() for task in config.tasks}
        sums = engine.rows(tables.shown.aggregate(_rows=tables.shown.count(), **labels))[0]
        return {
            "impressions": int(sums["_rows"]),
            "labels": {task: int(sums[task] or 0) for task in config.tasks},
            "remarks": dict(found),
        }
    return {"remarks": dict(found)}


def _long_baskets(engine: Engine, events: ir.Table) -> int:
    known = events.filter(events.request_id.notnull())
    length = known.timestamp.max() - known.timestamp.min()
    baskets = known.group_by(REQUEST).aggregate(length=length)
    return count_rows(engine, baskets.filter(baskets["length"] > _DAY))


def _lacking(engine: Engine, table: ir.Table, known: ir.Table, key: str) -> int:
    return count_rows(engine, table.select(key).distinct().anti_join(known, key))


def _impressions(engine: Engine, shown: ir.Table, events: ir.Table, config: IngestConfig) -> dict[str, int]:
    labels = [f"label_{task}" for task in config.tasks]
    offered = _spread(shown, [*REQUEST, "item_id"], labels)
    repeated = offered.filter(offered["_rows"] > 1)
    asked = _spread(
        shown, REQUEST, ["timestamp", *(f"context_{entry.name}" for entry in config.shown_context)]
    )
    sums = engine.rows(
        repeated.aggregate(rows=(repeated["_rows"] - 1).sum(), differ=repeated["_differ"].cast("int64").sum())
    )[0]
    return {
        "repeated_impressions": int(sums["rows"] or 0),
        "repeated_impressions_with_other_labels": int(sums["differ"] or 0),
        "requests_of_several_times_or_contexts": count_rows(engine, asked.filter(asked["_differ"])),
        "impressions_of_users_without_events": count_rows(
            engine, shown.anti_join(events.select("user_id").distinct(), "user_id")
        ),
    }


def _spread(table: ir.Table, keys: Sequence[str], names: Sequence[str]) -> ir.Table:
    """The keys, _rows, and _differ: whether some of the columns differs within the key."""
    ends = {f"_least_{name}": table[name].min() for name in names}
    ends |= {f"_most_{name}": table[name].max() for name in names}
    found = table.group_by(list(keys)).aggregate(_rows=table.count(), **ends)
    differ = (found[f"_least_{name}"] != found[f"_most_{name}"] for name in names)
    return found.mutate(_differ=reduce(lambda one, other: one | other, differ))


def remark_lines(manifest: LogManifest) -> list[str]:
    """One line a fact; WARNING where the log is hardly what was meant."""
    report = manifest.report
    lines = [
        f"{name}: the protocol {manifest.ingest['protocol']} does not use this setting"
        for name in report.get("unused_settings", [])
    ]
    lines += [
        f"{count:,} {name.replace('_', ' ')} ({_KEPT[name]})"
        for name, count in report.get("remarks", {}).items()
        if count
    ]
    for task, positives in report.get("labels", {}).items():
        rows = report["impressions"]
        lines.append(f"label {task}: {positives:,} of {rows:,} impressions are positive")
        if positives in (0, rows):
            lines.append(f"WARNING: label {task} has one class only: nothing can be learnt from it")
    everything = manifest.features | {f"context {name}": info for name, info in manifest.context.items()}
    lines += [
        f"WARNING: {name} has no value in any row" for name, info in everything.items() if info.rows == 1
    ]
    return lines + _split_lines(manifest)


_KEPT = {
    "baskets_longer_than_a_day": "the first time counts; an id that is used again is one basket",
    "repeated_events": "equal in all that is used; kept, as several events of one second",
    "repeated_impressions": "an item twice in one request; kept, as two candidates",
    "repeated_impressions_with_other_labels": "the item is offered with both labels",
    "requests_of_several_times_or_contexts": "the earliest time and the largest context count",
    "impressions_of_users_without_events": "their history is empty",
    "items_that_the_item_table_lacks": "their features are unknown",
    "users_that_the_user_table_lacks": "their context is unknown",
    "impressions_of_items_without_events": "what the events would say of these items is unknown",
}


def _split_lines(manifest: LogManifest) -> list[str]:
    """Splits without requests, and dates that lie outside of the data."""
    spans = {table: Span(**span) for table, span in manifest.report.get("time", {}).items()}
    if not spans:
        return []
    lines = [f"{table} are {span}" for table, span in spans.items()]
    table, span = list(spans.items())[-1]
    for name, day in (manifest.ingest.get("split") or {}).items():
        if not span.has(day):
            lines.append(f"WARNING: split.{name} = {day} lies outside of the {table}, which are {span}")
    lines += [
        f"WARNING: the split {name} has no requests; move the dates of [split], or ask for less history"
        for name, info in manifest.splits.items()
        if not info.requests
    ]
    return lines
