"""What an ingest read, wrote and left out: for the manifest, and for people."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.engine import Engine, count_rows
from pipelines.ingest.exposure import exposure_lines
from pipelines.ingest.history_free import history_free_lines
from pipelines.ingest.numbers import number_lines
from pipelines.ingest.protocols.protocol import Tables
from pipelines.ingest.remarks import Span, lone_lines, remark_lines
from pipelines.ingest.requests import Requests
from pipelines.ingest.sources import Survey
from trainer.log.schema import ColumnInfo, LogManifest, SplitInfo

_QUANTILES = (50, 90, 99)
_HEAD = ("column", "named by", "type", "read as", "nulls", "from", "to")
_LONGEST = 28
_SHORT = "requests_below_min_history"  # of the dropped
_TOO_LATE = 253_402_300_800  # the year 10,000: no date can be shown


@dataclass(frozen=True)
class Counts:
    """Where the numbers come from: the tables, the requests, and what was written.

    Attributes:
        duplicates: events that several domains have; times: table -> its first and last second.
        new: (values, occurrences) of each feature that the older log's vocabulary, if there is one, lacks.
    """

    tables: Tables
    requests: Requests
    splits: Mapping[str, SplitInfo]
    duplicates: int
    new: Mapping[str, tuple[int, int]]
    times: Mapping[str, Span]


def full_report(engine: Engine, counts: Counts, config: IngestConfig) -> dict[str, Any]:
    """Totals, quantiles of the history length at the requests, and dropped rows by reason."""
    events, eligible = counts.tables.events, counts.requests.eligible
    sums = {"events": events.count(), "users": events.user_id.nunique()}
    totals = engine.rows(events.aggregate(**sums, without=events.request_id.isnull().sum()))[0]
    requests = engine.rows(eligible.aggregate(users=eligible.user_id.nunique(), requests=eligible.count()))[0]
    dropped = {"events_without_request": int(totals["without"])}
    # Lower quantiles, from the number of requests of each length: engines interpolate differently.
    by_length = engine.rows(eligible.group_by("history_end").aggregate(requests=eligible.count()))
    lengths = sorted((int(row["history_end"]), int(row["requests"])) for row in by_length)
    upto = list(accumulate(count for _, count in lengths))
    ranks = {f"p{q}": (int(requests["requests"]) - 1) * q // 100 + 1 for q in _QUANTILES}
    quantiles = {name: lengths[bisect_left(upto, rank)][0] for name, rank in ranks.items()}
    report = {
        "events": int(totals["events"]),
        "time": {table: {"first": span.first, "last": span.last} for table, span in counts.times.items()},
        "event_users": int(totals["users"]),
        "request_users": int(requests["users"]),
        "history_length": {**quantiles, "max": lengths[-1][0]},
        "event_items": counts.requests.attributes.items,
        "changing_items": dict(counts.requests.attributes.changing),
        "dropped": dropped | _count_dropped(engine, counts, int(requests["requests"]), config),
    }
    if config.request_protocol.draws_negatives:
        new = counts.requests.new_positives
        report["positives_new_items"] = {split: new[split] for split in counts.splits}
    if exposure := counts.requests.exposures.report():
        report["exposure"] = exposure
    if config.vocabulary.log:
        report["new_values"] = {
            name: {"values": values, "occurrences": occurrences}
            for name, (values, occurrences) in counts.new.items()
        }
    return report


def _count_dropped(engine: Engine, counts: Counts, requests: int, config: IngestConfig) -> dict[str, int]:
    every = counts.requests.every
    short = every.history_end < config.requests.min_history
    sums = engine.rows(every.aggregate(all=every.count(), short=short.cast("int64").sum()))[0]
    below = int(sums["short"] or 0)
    dropped = {_SHORT: below}
    if config.requests.per_user:
        dropped["requests_over_per_user"] = int(sums["all"]) - below - requests
    dropped |= config.request_protocol.dropped(engine, counts.tables.events, config)
    if config.domains:
        dropped["duplicate_events"] = counts.duplicates
    if config.request_protocol.draws_negatives:
        positives = sum(info.positives for info in counts.splits.values())
        candidates = sum(info.candidates for info in counts.splits.values())
        if config.requests.new_items == "drop":
            dropped["requests_for_new_items_only"] = requests - count_rows(engine, counts.requests.offers)
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
    lines += _label_lines(manifest)
    lengths = ", ".join(f"{name} {value:,}" for name, value in report["history_length"].items())
    lines.append(f"history length at request: {lengths}")
    lines += _dropped_lines(manifest)
    lines += exposure_lines(report.get("exposure", {}), _exposure_settings(manifest))
    lines += _feature_lines(manifest)
    lines += _time_lines(manifest) + remark_lines(manifest)
    lines += lone_lines(manifest.report, manifest.features) + history_free_lines(manifest)
    lines += column_lines(manifest.columns, manifest.notes)
    return sorted(lines, key=lambda line: line.startswith("WARNING"))


def _dropped_lines(manifest: LogManifest) -> list[str]:
    """A line for each reason; a warning where the history that requests need has cost most of them."""
    dropped = manifest.report["dropped"]
    words = {reason: f"{count:,} {reason.replace('_', ' ')}" for reason, count in dropped.items() if count}
    lines = {reason: f"dropped: {told}" for reason, told in words.items()}
    if short := dropped.get(_SHORT, 0):
        requests = sum(info.requests for info in manifest.splits.values())
        requests += sum(count for reason, count in dropped.items() if reason.startswith("requests_"))
        key = f"requests.min_history = {manifest.ingest.get('requests', {}).get('min_history')}"
        lines[_SHORT] = (
            f"dropped: {short:,} of {requests:,} requests, which have fewer earlier events than {key}"
        )
        if 2 * short > requests:
            lines[_SHORT] = f"WARNING: {lines[_SHORT]}; lower it to keep more"
    return list(lines.values())


def _exposure_settings(manifest: LogManifest) -> dict[str, Any]:
    return manifest.ingest.get("impressions", {}).get("exposure") or {}


def _feature_lines(manifest: LogManifest) -> list[str]:
    """How many ids each feature has."""
    raw = manifest.report.get("raw_ids", {})
    context = {f"context {name}": info for name, info in manifest.context.items()}
    lines = []
    lines += number_lines(manifest.report.get("numbers", {}))
    for name, info in (manifest.features | context).items():
        if info.encoder is not None:
            continue
        if not info.raw:
            lines.append(f"{name}: {info.rows:,} table rows")
            continue
        known = raw.get(name.replace("context ", "context_"), {"values": 0, "nothing": 0})
        kind = "hashes of text" if info.hashed else "raw ids"
        lines.append(f"{name}: {kind}, {known['values']:,} different ones")
        if known["nothing"]:
            lines.append(f"WARNING: {name} has the id 0 in {known['nothing']:,} places, which means no value")
    return lines


def _label_lines(manifest: LogManifest) -> list[str]:
    """How many candidates of each split have a label, where there are several or not all have it."""
    lines = []
    for task in manifest.tasks if len(manifest.tasks) > 1 or manifest.partial else ():
        counts = {name: info.labels[task] for name, info in manifest.splits.items() if info.requests}
        told = (f"{name} {one.positives:,} of {one.observed:,}" for name, one in counts.items())
        lines.append(f"label {task}, positives of the observed: {', '.join(told)}")
        lines += [
            f"WARNING: label {task} was observed nowhere in the split {name}"
            for name, one in counts.items()
            if not one.observed
        ]
    return lines


def _time_lines(manifest: LogManifest) -> list[str]:
    """What changes, and what is new: as of the requests, and to the older log's vocabulary."""
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
    vocabulary = manifest.ingest.get("vocabulary", {})
    fate = "added to" if vocabulary.get("extend") else "unknown to"
    return lines + [
        f"{name.replace('context_', 'context ')}: {new['values']:,} values in {new['occurrences']:,} places "
        f"{fate} the vocabulary of {vocabulary.get('log')}"
        for name, new in report.get("new_values", {}).items()
    ]


def column_lines(columns: Sequence[ColumnInfo], notes: Sequence[str]) -> list[str]:
    """One line a table whose files do not say their types, and one for everything remarkable."""
    lines = []
    for table in dict.fromkeys(column.table for column in columns):
        theirs = [column for column in columns if column.table == table]
        if any("CSV" in column.found for column in theirs):
            told = dict.fromkeys(f"{column.column} {column.read_as}" for column in theirs)
            lines.append(f"{table}, read from CSV: {', '.join(told)}")
    return list(dict.fromkeys([*lines, *_column_notes(columns), *notes]))


def preview_lines(survey: Survey) -> list[str]:
    """Every column that a setting names with its range (times in UTC), and those that none names."""
    lines: list[str] = []
    for table in dict.fromkeys(column.table for column in survey.columns):
        theirs = [column for column in survey.columns if column.table == table]
        ranges = [survey.ranges.get((table, column.setting), (0, None, None)) for column in theirs]
        beyond = [survey.beyond.get((table, column.setting)) for column in theirs]
        rows: list[tuple[str, ...]] = [_HEAD]
        rows += [
            (one.column, one.setting, one.found, one.read_as, f"{nulls:,}", _cut(one, least), _cut(one, most))
            for one, (nulls, least, most) in zip(theirs, ranges, strict=True)
        ]
        if any(count is not None for count in beyond):
            # Of numbers alone: an encoder's range is nothing that other columns have.
            told = ["beyond range", *("" if count is None else f"{count:,}" for count in beyond)]
            rows = [(*row, cell) for row, cell in zip(rows, told, strict=True)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines.append(f"{table}: {survey.rows.get(table, 0):,} rows")
        for row in rows:
            padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append(f"  {'  '.join(padded)}".rstrip())
    return lines + list(dict.fromkeys([*_column_notes(survey.columns), *survey.notes]))


def _column_notes(columns: Sequence[ColumnInfo]) -> list[str]:
    return [f"{one.table}: {one.column} is read as {one.read_as}: {one.note}" for one in columns if one.note]


def _cut(column: ColumnInfo, value: object) -> str:
    """A value as it is meant: a day and a time, or a number without a needless point."""
    text = "" if value is None else repr(value)
    if isinstance(value, float):
        text = f"{value:g}"
    if column.read_as == "unix seconds" and isinstance(value, int) and 0 <= value < _TOO_LATE:
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S")
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
