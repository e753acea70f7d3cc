"""What an ingest read, wrote and left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ibis.expr import types as ir

from pipelines.ingest.alone import lone_lines
from pipelines.ingest.attributes import Attributes
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.engine import Engine, count_rows
from pipelines.ingest.preview import column_lines
from pipelines.ingest.protocols.protocol import REQUEST, Past, Tables
from pipelines.ingest.remarks import Span, remark_lines
from trainer.log.schema import LogManifest, SplitInfo

_QUANTILES = (50, 90, 99)


@dataclass(frozen=True)
class Asked:
    """The requests that were found, those that are kept (`asked`), and what these offer.

    `new_positives`: split -> positives whose item no earlier event has.
    """

    found: ir.Table
    asked: ir.Table
    offered: ir.Table
    attributes: Attributes
    new_positives: Mapping[str, int]


@dataclass(frozen=True)
class Counts:
    """Where the numbers come from: the tables, the requests, and what was written.

    `new`: (values, occurrences) of each feature that the older log's vocabulary, if there is one, lacks.
    """

    tables: Tables
    requests: Asked
    splits: Mapping[str, SplitInfo]
    duplicates: int
    new: Mapping[str, tuple[int, int]]
    times: Mapping[str, Span]


def new_positives(
    engine: Engine, candidates: ir.Table, asked: ir.Table, past: Past, config: IngestConfig
) -> dict[str, int]:
    """split -> how many positives have an item that no event before their request has."""
    chosen = candidates.filter(candidates[f"label_{config.task}"] > 0).select(*REQUEST, "item_id")
    timed = chosen.inner_join(asked.select(*REQUEST, "timestamp", "split"), REQUEST)
    timed = timed.inner_join(past.items, "item_id")
    new = timed.filter(timed.since >= timed.timestamp)
    return {
        row["split"]: int(row["rows"])
        for row in engine.rows(new.group_by("split").aggregate(rows=new.count()))
    }


def full_report(engine: Engine, counts: Counts, config: IngestConfig) -> dict[str, Any]:
    """Totals, quantiles of the history length at the requests, and dropped rows by reason."""
    events, asked = counts.tables.events, counts.requests.asked
    totals = engine.rows(
        events.aggregate(
            events=events.count(),
            users=events.user_id.nunique(),
            without=events.request_id.isnull().sum(),
        )
    )[0]
    requests = engine.rows(asked.aggregate(users=asked.user_id.nunique(), requests=asked.count()))[0]
    dropped = {"events_without_request": int(totals["without"])}
    report = {
        "events": int(totals["events"]),
        "time": {table: {"first": span.first, "last": span.last} for table, span in counts.times.items()},
        "event_users": int(totals["users"]),
        "request_users": int(requests["users"]),
        "history_length": _lengths(engine, asked, int(requests["requests"])),
        "event_items": counts.requests.attributes.of,
        "changing_items": dict(counts.requests.attributes.changing),
        "dropped": dropped | _dropped(engine, counts, int(requests["requests"]), config),
    }
    if config.protocol != "impressions":
        report["positives_new_items"] = {
            split: counts.requests.new_positives[split] for split in counts.splits
        }
    if config.vocabulary.log:
        report["new_values"] = {
            name: {"values": values, "occurrences": occurrences}
            for name, (values, occurrences) in counts.new.items()
        }
    return report


def _lengths(engine: Engine, asked: ir.Table, requests: int) -> dict[str, int]:
    """Lower quantiles, from the number of requests of each length: engines interpolate differently."""
    lengths = asked.group_by("history_end").aggregate(requests=asked.count())
    found = {row["history_end"]: row["requests"] for row in engine.rows(lengths)}
    wanted = {f"p{q}": (requests - 1) * q // 100 + 1 for q in _QUANTILES}
    quantiles, seen = dict.fromkeys(wanted, 0), 0
    for length in sorted(found):
        for name, rank in wanted.items():
            if seen < rank <= seen + found[length]:
                quantiles[name] = int(length)
        seen += found[length]
    return {**quantiles, "max": int(max(found, default=0))}


def _dropped(engine: Engine, counts: Counts, requests: int, config: IngestConfig) -> dict[str, int]:
    found = counts.requests.found
    short = found.history_end < config.requests.min_history
    sums = engine.rows(found.aggregate(all=found.count(), short=short.cast("int64").sum()))[0]
    below = int(sums["short"] or 0)
    dropped = {"requests_below_min_history": below}
    if config.requests.per_user:
        dropped["requests_over_per_user"] = int(sums["all"]) - below - requests
    if config.protocol == "leave-last":
        events = counts.tables.events
        sizes = events.group_by("user_id").aggregate(size=events.count())
        few = (sizes["size"] < config.requests.min_events).cast("int64")
        dropped["users_below_min_events"] = int(engine.rows(sizes.aggregate(few=few.sum()))[0]["few"] or 0)
    if config.domains:
        dropped["duplicate_events"] = counts.duplicates
    if config.protocol != "impressions":
        positives = sum(info.positives for info in counts.splits.values())
        candidates = sum(info.candidates for info in counts.splits.values())
        if config.requests.new_items == "drop":
            offered = counts.requests.offered
            left = requests - count_rows(engine, offered)
            dropped["requests_for_new_items_only"] = left
        dropped["negatives_not_found"] = positives * (config.requests.negatives + 1) - candidates
    return dropped


def report_lines(manifest: LogManifest) -> list[str]:
    """The manifest for people: one line a split, then history lengths, what was left out, and warnings."""
    report = manifest.report
    lines = [
        f"{report['events']:,} events of {report['event_users']:,} users;"
        f" requests of {report['request_users']:,} users"
    ]
    layout = "requests" if manifest.ingest.get("files", {}).get("layout") == "request" else "users"
    # Splits count those of the first label.
    of = f" of {manifest.tasks[0]}" if len(manifest.tasks) > 1 else ""
    for name, info in manifest.splits.items():
        lines.append(
            f"{name:<10} {info.rows:>9,} rows ({layout}) {info.requests:>11,} requests"
            f" {info.candidates:>12,} candidates {info.positives:>11,} positives{of}"
        )
    lengths = ", ".join(f"{name} {value:,}" for name, value in report["history_length"].items())
    lines.append(f"history length at request: {lengths}")
    lines += [
        f"dropped: {count:,} {reason.replace('_', ' ')}"
        for reason, count in report["dropped"].items()
        if count
    ]
    lines += [f"{name}: {info.rows:,} table rows" for name, info in manifest.features.items()]
    lines += [f"context {name}: {info.rows:,} table rows" for name, info in manifest.context.items()]
    lines += _time_lines(manifest) + _new_lines(manifest) + remark_lines(manifest)
    lines += lone_lines(manifest.report, manifest.features)
    lines += column_lines(manifest.columns, manifest.notes)
    return sorted(lines, key=lambda line: line.startswith("WARNING"))


def _time_lines(manifest: LogManifest) -> list[str]:
    """What changes, and what is new, as of the requests."""
    report = manifest.report
    lines = [
        f"{name}: changes in time for {count:,} of {report['event_items']:,} items;"
        " candidates have the last value before their request"
        for name, count in report.get("changing_items", {}).items()
    ]
    new = {split: count for split, count in report.get("positives_new_items", {}).items() if count}
    if new:
        counts = ", ".join(
            f"{split} {count:,} of {manifest.splits[split].positives:,}" for split, count in new.items()
        )
        lines.append(
            f"positives whose item no earlier event has: {counts}; no negative is new,"
            ' so a model can tell them apart (requests.new_items = "drop" leaves them out)'
        )
    return lines


def _new_lines(manifest: LogManifest) -> list[str]:
    vocabulary = manifest.ingest.get("vocabulary", {})
    fate = "added to" if vocabulary.get("extend") else "unknown to"
    return [
        f"{name.replace('context_', 'context ')}: {new['values']:,} values in {new['occurrences']:,} places "
        f"{fate} the vocabulary of {vocabulary.get('log')}"
        for name, new in manifest.report.get("new_values", {}).items()
    ]
