"""What is odd about the raw tables, counted, with one line for each.

They may hold rows that nobody uses, that are there twice or that contradict one another. A column may predict
a label all alone: most often it holds the answer, which was known only after the request.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from ibis.expr import types as ir

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.engine import Engine, count_rows
from pipelines.ingest.numbers import encoders_of
from pipelines.ingest.portable_hash import digest
from pipelines.ingest.protocols.protocol import REQUEST, Tables
from pipelines.ingest.protocols.table import PROTOCOLS
from pipelines.ingest.sections import RequestsConfig
from trainer.log.schema import LogManifest
from trainer.quality.ranking import auc

_SHARED_SETTINGS = {"min_history", "per_user", "new_items"}  # of [requests]: every protocol reads them
_WORDS = {
    "repeated_events": "equal in all that is used; kept, as several events of one second",
    "repeated_impressions": "an item twice in one request; kept, as two candidates",
    "repeated_impressions_with_other_labels": "the item is offered with both labels",
    "requests_of_several_times_or_contexts": "the earliest time and the largest context count",
    "impressions_of_users_without_events": "their history is empty",
    "items_that_the_item_table_lacks": "their features are unknown",
    "users_that_the_user_table_lacks": "their context is unknown",
    "impressions_of_items_without_events": "what the events would say of these items is unknown",
}
_ROWS = 40_000  # candidates in which lone predictors are looked for
_EACH = 10  # positives and negatives of the half that measures, at least
_TOO_GOOD = 0.99
Values = npt.NDArray[Any]


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
    protocol, given = config.request_protocol, config.requests.model_fields_set
    known = protocol.settings | _SHARED_SETTINGS
    known |= {"popularity_days"} if protocol.draws_negatives else set()
    unused = [f"requests.{name}" for name in RequestsConfig.model_fields if name in given - known]
    other = "task" if protocol.reads_impressions else "impressions"
    unused += [other] if other in config.model_fields_set else []
    if config.events.request and not protocol.reads_request_ids:
        unused.append("events.request")
    return unused


def remarks(engine: Engine, tables: Tables, buckets: int, config: IngestConfig) -> dict[str, Any]:
    """Counts of rows that are there more than once, and of impressions that contradict one another."""
    found: Counter[str] = Counter()
    for bucket in range(buckets):
        part = tables.of_buckets(bucket, bucket + 1)
        events = part.events
        found["repeated_events"] += count_rows(engine, events) - count_rows(engine, events.distinct())
        found.update(config.request_protocol.remarks(engine, events, config))
        if part.impressions is not None:
            found.update(_impressions(engine, part.impressions, events, config))
    if tables.items is not None:
        found["items_that_the_item_table_lacks"] = _count_lacking(
            engine, tables.events, tables.items, "item_id"
        )
    if tables.users is not None:
        asking = tables.events if tables.impressions is None else tables.impressions
        found["users_that_the_user_table_lacks"] = _count_lacking(engine, asking, tables.users, "user_id")
    facts: dict[str, Any] = {}
    if tables.impressions is not None:
        had = tables.impressions.anti_join(tables.events.select("item_id").distinct(), "item_id")
        found["impressions_of_items_without_events"] = count_rows(engine, had)
        labels = {task: tables.impressions[f"label_{task}"] for task in config.tasks}
        positive = {task: (label >= 0.5).cast("int64").sum() for task, label in labels.items()}
        partial = {f"_has_{task}": labels[task].count() for task, one in config.labels.items() if one.partial}
        asked = tables.impressions.aggregate(_rows=tables.impressions.count(), **positive, **partial)
        sums = engine.rows(asked)[0]
        counts = {task: int(sums[task] or 0) for task in config.tasks}
        facts = {"impressions": int(sums["_rows"]), "labels": counts}
        facts["observed"] = {name.removeprefix("_has_"): int(sums[name]) for name in partial}
    return facts | {"remarks": dict(found)}


def _count_lacking(engine: Engine, table: ir.Table, known: ir.Table, key: str) -> int:
    return count_rows(engine, table.select(key).distinct().anti_join(known, key))


def _impressions(engine: Engine, shown: ir.Table, events: ir.Table, config: IngestConfig) -> dict[str, int]:
    labels = [f"label_{task}" for task in config.tasks]
    offered = _spread(shown, [*REQUEST, "item_id"], labels)
    repeated = offered.filter(offered["_rows"] > 1)
    asked = _spread(shown, REQUEST, ["timestamp", *config.context_of("impressions")])
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
    report, words = manifest.report, {**_WORDS, **PROTOCOLS[manifest.ingest["protocol"]].remark_words}
    lines = [
        f"{name}: the protocol {manifest.ingest['protocol']} does not use this setting"
        for name in report.get("unused_settings", [])
    ]
    lines += [
        f"{count:,} {name.replace('_', ' ')} ({words[name]})"
        for name, count in report.get("remarks", {}).items()
        if count
    ]
    for task, positives in report.get("labels", {}).items():
        rows, of = report["impressions"], ""
        if task in report.get("observed", {}):
            rows, of = report["observed"][task], f" (of {rows:,}) in which it was observed"
        lines.append(f"label {task}: {positives:,} of {rows:,} impressions{of} are positive")
        if not rows:
            lines.append(f"WARNING: label {task} was observed nowhere: nothing can be learnt from it")
        elif positives in (0, rows):
            lines.append(f"WARNING: label {task} has one class only: nothing can be learnt from it")
    everything = manifest.features | {f"context {name}": info for name, info in manifest.context.items()}
    lines += [
        f"WARNING: {name} has no value in any row"
        for name, info in everything.items()
        if info.rows == 1 and not info.raw and info.encoder is None
    ]
    return lines + _split_lines(manifest)


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


def lone_predictors(engine: Engine, offered: ir.Table, config: IngestConfig) -> list[dict[str, Any]]:
    """column, task, auc: what predicts a label of training too well to be known before it.

    A column is judged on one half of a seeded sample of requests by the label rates of its values in the
    other half: a value that is there once says nothing, so that an id does not look good by chance.
    """
    train = offered.filter(offered.split == "train")
    total = int(engine.rows(train.aggregate(rows=train.num_candidates.sum()))[0]["rows"] or 0)
    key = digest(config.seed, "alone", train.user_id, train.request_id)
    context = [f"context_{entry.name}" for entry in config.context]
    sample = train.select("candidates", *context, _key=key)
    if total > _ROWS:
        sample = sample.filter(sample["_key"] < f"{(_ROWS << 32) // total:08x}")
    weights = {"weight", *(f"weight_{task}" for task in config.label_weights)}
    found = _columns(list(engine.stream(sample, 1024)), context, weights)
    if not found:
        return []
    for name in found.keys() & encoders_of(config).keys():
        # By their order, too; whatever is missing has one value of its own.
        found[name] = found[name].astype(np.float64)
    fits = found.pop("_key") == 0
    labels = {task: found.pop(f"label_{task}") for task in config.tasks}
    has = {task: ~np.isnan(label) for task, label in labels.items()}
    odd: list[dict[str, Any]] = []
    for name, values in found.items():
        for task, label in labels.items():
            value = _alone(values[has[task]], label[has[task]] >= 0.5, fits[has[task]])
            if value > _TOO_GOOD:
                odd.append({"column": name.removeprefix("numeric_"), "task": task, "auc": round(value, 4)})
    return sorted(odd, key=lambda one: (one["task"], one["column"]))


def _columns(
    batches: list[pa.RecordBatch], context: list[str], weights: Collection[str]
) -> dict[str, Values]:
    """name -> one value a candidate, weights left out; `_key` is the half that its request belongs to."""
    parts: dict[str, list[Values]] = {}
    for batch in batches:
        lists = batch.column("candidates")
        owner, flat = pc.list_parent_indices(lists), pc.list_flatten(lists)
        halves = [int(key[-1], 16) % 2 for key in batch.column("_key").to_pylist()]
        columns = {"_key": pa.array(halves, pa.int8()).take(owner)}
        columns |= {name: batch.column(name).take(owner) for name in context}
        names = [field.name for field in flat.type if not field.name.startswith("_")]
        columns |= {name: flat.field(name) for name in names if name not in weights}
        for name in columns:
            values = columns[name].to_numpy(zero_copy_only=False)
            if pa.types.is_nested(columns[name].type):
                # The ids of a multi-valued feature are one text.
                values = np.array([str(ids) for ids in columns[name].to_pylist()], dtype=object)
            parts.setdefault(name, []).append(values)
    return {name: np.concatenate(part) for name, part in parts.items()}


def _alone(values: Values, label: Values, fits: Values) -> float:
    """The area under the ROC curve of the half that does not fit; 0 where it has too few of either class."""
    measured = label[~fits]
    if min(measured.sum(), (~measured).sum()) < _EACH or not fits.any():
        return 0.0
    words, codes = np.unique(values, return_inverse=True)
    prior = label[fits].mean()
    seen = np.bincount(codes[fits], minlength=words.size)
    hits = np.bincount(codes[fits], weights=label[fits], minlength=words.size)
    best = auc(((hits + prior) / (seen + 1))[codes[~fits]], measured)
    if values.dtype.kind == "f":
        # A number with many values tells more by its order.
        ordered = auc(values[~fits], measured)
        best = max(best, ordered, 1 - ordered)
    return best


def lone_lines(report: Mapping[str, Any], candidate_features: Mapping[str, Any]) -> list[str]:
    """A warning a column."""
    lines = []
    for one in report.get("predicts_alone", []):
        name = one["column"]
        if name == "item_id":
            lines.append(
                f"WARNING: the item alone tells the label {one['task']} (AUC {one['auc']:.4f}): then it is a"
                " property of items, and there is nothing of users to learn"
            )
            continue
        remedy = "leave it out"
        if name in candidate_features:
            remedy = 'give it side = "history", or leave it out'
        called = name.replace("context_", "context ")
        lines.append(
            f"WARNING: {called} alone predicts the label {one['task']} of its own row"
            f" (AUC {one['auc']:.4f}): if it is known only after the request, {remedy}"
        )
    return lines
