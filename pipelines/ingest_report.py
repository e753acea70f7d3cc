"""What an ingest read, wrote and left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ibis.expr import types as ir

from pipelines.ingest_engine import Engine
from pipelines.ingest_preview import column_lines
from trainer.data.ingest_config import IngestConfig
from trainer.data.protocol import Tables
from trainer.data.schema import LogManifest, SplitInfo

_QUANTILES = (50, 90, 99)


@dataclass(frozen=True)
class Counts:
    """Where the numbers come from: all requests `found`, those `asked` of them, and what was written.

    `new`: (values, occurrences) of each feature that the older log's vocabulary, if there is one, lacks.
    """

    tables: Tables
    found: ir.Table
    asked: ir.Table
    splits: Mapping[str, SplitInfo]
    duplicates: int
    new: Mapping[str, tuple[int, int]]


def full_report(engine: Engine, counts: Counts, config: IngestConfig) -> dict[str, Any]:
    """Totals, quantiles of the history length at the requests, and dropped rows by reason."""
    events, asked = counts.tables.events, counts.asked
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
        "event_users": int(totals["users"]),
        "request_users": int(requests["users"]),
        "history_length": _lengths(engine, asked, int(requests["requests"])),
        "dropped": dropped | _dropped(engine, counts, int(requests["requests"]), config),
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
    found, short = counts.found, counts.found.history_end < config.requests.min_history
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
        dropped["negatives_not_found"] = positives * (config.requests.negatives + 1) - candidates
    return dropped


def report_lines(manifest: LogManifest) -> list[str]:
    """The manifest for people: one line a split, then history lengths and what was left out."""
    report = manifest.report
    lines = [
        f"{report['events']:,} events of {report['event_users']:,} users;"
        f" requests of {report['request_users']:,} users"
    ]
    layout = "requests" if manifest.ingest.get("files", {}).get("layout") == "request" else "users"
    for name, info in manifest.splits.items():
        lines.append(
            f"{name:<10} {info.rows:>9,} rows ({layout}) {info.requests:>11,} requests"
            f" {info.candidates:>12,} candidates {info.positives:>11,} positives"
        )
    lengths = ", ".join(f"{name} {value:,}" for name, value in report["history_length"].items())
    lines.append(f"history length at request: {lengths}")
    lines += [f"dropped: {count:,} {reason.replace('_', ' ')}" for reason, count in report["dropped"].items()]
    lines += [f"{name}: {info.rows:,} table rows" for name, info in manifest.features.items()]
    lines += [f"context {name}: {info.rows:,} table rows" for name, info in manifest.context.items()]
    return lines + _new_lines(manifest) + column_lines(manifest.columns, manifest.notes)


def _new_lines(manifest: LogManifest) -> list[str]:
    vocabulary = manifest.ingest.get("vocabulary", {})
    fate = "added to" if vocabulary.get("extend") else "unknown to"
    return [
        f"{name.replace('context_', 'context ')}: {new['values']:,} values in {new['occurrences']:,} places "
        f"{fate} the vocabulary of {vocabulary.get('log')}"
        for name, new in manifest.report.get("new_values", {}).items()
    ]
