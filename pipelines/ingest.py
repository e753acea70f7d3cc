"""Raw events -> sequence log.

The relational part is one chain of Ibis tables, run by DuckDB here and portable to Spark:

    events -> vocabularies -> encoded events -> requests -> candidates -> user blocks -> Parquet

Vocabularies and popularity come from all events; `users` only limits whose requests are written, so
a trial log is a part of the full one. Everything random is a seeded hash of ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
from ibis.expr import types as ir

from embeddings.errors import DataError
from pipelines.event_table import open_events
from trainer.data import next_basket
from trainer.data.ingest_config import IngestConfig, load_ingest_config
from trainer.data.log_writer import check_target, staged, write_manifest, write_split
from trainer.data.portable_hash import digest
from trainer.data.schema import FeatureInfo, LogManifest, SplitInfo, arrow_schema

__all__ = ["IngestConfig", "ingest", "load_ingest_config", "report_lines"]

SPLITS = ("train", "validation", "test")
_REQUEST = ["user_id", "request_id"]


class Candidates(Protocol):
    """Adds candidates to requests: see `trainer.data.next_basket.candidates`."""

    def __call__(
        self, events: ir.Table, asked: ir.Table, popularity: ir.Table, config: IngestConfig
    ) -> ir.Table: ...


@dataclass(frozen=True)
class RequestProtocol:
    """What makes one way of asking differ from another; everything else is shared."""

    requests: Callable[[ir.Table], ir.Table]
    candidates: Candidates


PROTOCOLS = {"next-basket": RequestProtocol(next_basket.requests, next_basket.candidates)}


def ingest(events: Path, out: Path, config: IngestConfig, *, overwrite: bool = False) -> LogManifest:
    """Writes the sequence log of an event table; `out` appears whole or not at all.

    Args:
        events: a Parquet file with the columns that `config.events` names.
        out: the log's folder. An existing log is replaced only with `overwrite`.

    Raises:
        DataError: the events are missing or wrong, `out` is taken, or no request is left.
    """
    out = Path(out).absolute()
    check_target(out, overwrite)
    with staged(out, overwrite) as root:
        spill = root / "spill"
        engine = _connect(config, spill)
        try:
            raw = open_events(engine, Path(events), config)
            manifest = _write_log(engine, raw, root, config, Path(events))
        finally:
            engine.disconnect()
        if spill.exists():
            spill.rmdir()
        write_manifest(root, manifest)
    return manifest


def _connect(config: IngestConfig, spill: Path) -> Any:
    settings = {"memory_limit": config.engine.memory_limit, "temp_directory": str(spill)}
    if config.engine.threads:
        settings["threads"] = str(config.engine.threads)
    engine = ibis.duckdb.connect(**settings)
    # DuckDB 2.0.0 keeps N - 1 rows instead of N where "row_number() - 1 < N" (Ibis' row_number) stands in
    # a common table expression: this rewrite reads the "< N" as if nothing were subtracted.
    engine.con.execute("SET disabled_optimizers = 'top_n_window_elimination'")
    return engine


def _write_log(engine: Any, raw: ir.Table, root: Path, config: IngestConfig, source: Path) -> LogManifest:
    features = list(config.events.features)
    vocabularies = {
        name: engine.create_table(f"vocabulary_{name}", vocabulary(raw, name, config)) for name in features
    }
    events = engine.create_table("encoded", encode(raw, vocabularies))
    popularity = vocabularies["item_id"].select("count", item_id="id")
    if not popularity["count"].sum().execute():
        problem = f"no event before split.validation ({config.split.validation}); move that date"
        raise DataError(problem, file=source, column=config.events.timestamp)
    protocol = PROTOCOLS[config.protocol]
    found = engine.create_table("requests", timed_requests(events, protocol.requests(events), config))
    asked = found.filter(found.history_end >= config.requests.min_history)
    candidates = engine.create_table("candidates", protocol.candidates(events, asked, popularity, config))
    offered = engine.create_table("offers", offers(events, asked, candidates, config))
    sizes = _write_vocabularies(vocabularies, root)
    schema = arrow_schema(sizes, [config.task])
    layout = (config.files.rows_per_group, config.files.rows_per_file)
    splits = {}
    for split in SPLITS:
        rows = user_blocks(events, offered.filter(offered.split == split), config)
        batches = _stream(engine, rows, config.files.rows_per_group)
        splits[split] = write_split(batches, root, split, schema, layout)
    if not any(info.rows for info in splits.values()):
        problem = f"no request has {config.requests.min_history} earlier events; lower requests.min_history"
        raise DataError(problem, file=source)
    return LogManifest(
        features=sizes,
        tasks=[config.task],
        taxonomy=[name for name in features if name != "item_id"],
        splits=splits,
        ingest=config.model_dump(mode="json"),
        report=_report(events, found, splits, config),
    )


def _stream(engine: Any, rows: ir.Table, size: int) -> Iterator[pa.RecordBatch]:
    # Not rows.to_pyarrow_batches(): Ibis 12 calls a method that DuckDB 2 no longer has.
    yield from engine.con.sql(ibis.to_sql(rows, dialect="duckdb")).to_arrow_reader(size)


def vocabulary(raw: ir.Table, feature: str, config: IngestConfig) -> ir.Table:
    """value, id, count: dense ids from 1 in the order of the values; count is before validation."""
    known = raw.filter(raw[feature].notnull())
    before = (known.timestamp < config.split.validation_start).cast("int64")
    counted = known.group_by(value=known[feature]).aggregate(count=before.sum().cast("int64"))
    dense = ibis.row_number().over(order_by=counted.value) + 1
    return counted.mutate(id=dense.cast("int64")).select("value", "id", "count")


def encode(raw: ir.Table, vocabularies: dict[str, ir.Table]) -> ir.Table:
    """user_id, request_id, timestamp and one dense id a feature, 0 for null."""
    events = raw
    for feature, words in vocabularies.items():
        coded = words.select(**{f"{feature}_word": words.value, f"{feature}_code": words.id})
        events = events.left_join(coded, events[feature] == coded[f"{feature}_word"])
    codes = {name: events[f"{name}_code"].fill_null(0) for name in vocabularies}
    return events.select("user_id", "request_id", "timestamp", **codes)


def timed_requests(events: ir.Table, requests: ir.Table, config: IngestConfig) -> ir.Table:
    """Adds history_end, the number of the user's events strictly before the request, and the split.

    A request must happen at the time of one of its user's events.
    """
    if config.users:
        users = events.select("user_id").distinct()
        order = digest(config.seed, "user", users.user_id)
        requests = requests.semi_join(users.order_by(order).limit(config.users), "user_id")
    per_second = events.group_by(["user_id", "timestamp"]).aggregate(events=events.count())
    so_far = per_second.events.cumsum(group_by="user_id", order_by="timestamp")
    earlier = per_second.mutate(history_end=(so_far - per_second.events).cast("int64")).drop("events")
    timed = requests.inner_join(earlier, ["user_id", "timestamp"])
    split = ibis.cases(
        (timed.timestamp < config.split.validation_start, "train"),
        (timed.timestamp < config.split.test_start, "validation"),
        else_="test",
    )
    return timed.mutate(split=split).select(*_REQUEST, "timestamp", "history_end", "split")


def offers(events: ir.Table, asked: ir.Table, candidates: ir.Table, config: IngestConfig) -> ir.Table:
    """The asked requests with `candidates`, a list of structs in seeded order, and their number.

    A candidate's taxonomy is the one of the item's latest event.
    """
    taxonomy = [name for name in config.events.features if name != "item_id"]
    seen = events.group_by(["item_id", *taxonomy]).aggregate(last=events.timestamp.max())
    recent = [ibis.desc(seen.last), *(ibis.desc(seen[name]) for name in taxonomy)]
    seen = seen.mutate(place=ibis.row_number().over(group_by="item_id", order_by=recent))
    items = seen.filter(seen.place == 0).select("item_id", *taxonomy)
    joined = candidates.inner_join(items, "item_id")
    # Without a shuffle a model could tell a positive by its place in the list.
    order = digest(config.seed, "candidate", joined.user_id, joined.request_id, joined.item_id)
    fields = {name: joined[name] for name in ("item_id", *taxonomy, "label")}
    nested = joined.group_by(_REQUEST).aggregate(
        candidates=ibis.struct({"order": order, **fields}).collect(),
        num_candidates=joined.count(),
    )
    nested = nested.mutate(candidates=nested.candidates.sort())
    return asked.inner_join(nested, _REQUEST)


def user_blocks(events: ir.Table, offered: ir.Table, config: IngestConfig) -> ir.Table:
    """One row a user with the columns of `arrow_schema`, in a seeded order of users."""
    features = list(config.events.features)
    asked = {
        name: offered[name]
        for name in ("timestamp", "request_id", "history_end", "num_candidates", "candidates")
    }
    blocks = offered.group_by("user_id").aggregate(
        requests=ibis.struct(asked).collect(),
        num_requests=offered.count(),
        num_candidates=offered.num_candidates.sum().cast("int64"),
    )
    # Aggregated apart from `blocks`: using that twice makes DuckDB store its nested lists, which is slow.
    latest = offered.group_by("user_id").aggregate(last=offered.timestamp.max())
    past = events.inner_join(latest, "user_id")
    past = past.filter(past.timestamp < past["last"])
    # Events of one second have no order of their own, and logs often sort them by item id: shuffle.
    tie = digest(config.seed, "tie", past.user_id, past.timestamp, past.item_id)
    behaviour = {"timestamp": past.timestamp, "tie": tie, **{name: past[name] for name in features}}
    histories = past.group_by("user_id").aggregate(
        history=ibis.struct(behaviour).collect(), num_behaviors=past.count()
    )
    rows = blocks.inner_join(histories, "user_id")
    rows = rows.mutate(history=rows.history.sort(), requests=rows.requests.sort())
    rows = rows.order_by([digest(config.seed, "row", rows.user_id), rows.user_id])
    return rows.select(**_columns(rows, features, config.task))


def _columns(rows: ir.Table, features: list[str], task: str) -> dict[str, ir.Value]:
    def each(items: ir.Value, field: str) -> ir.Value:
        return items.map(lambda item: item[field])

    def each_candidate(field: str) -> ir.Value:
        return rows.requests.map(lambda request: each(request["candidates"], field))

    return {
        "user_id": rows.user_id,
        **{f"history_{name}": each(rows.history, name) for name in (*features, "timestamp")},
        "request_id": each(rows.requests, "request_id"),
        "request_timestamp": each(rows.requests, "timestamp"),
        "request_history_end": each(rows.requests, "history_end"),
        "request_num_candidates": each(rows.requests, "num_candidates"),
        **{f"candidate_{name}": each_candidate(name) for name in features},
        f"label_{task}": each_candidate("label"),
        **{name: rows[name] for name in ("num_behaviors", "num_requests", "num_candidates")},
    }


def _write_vocabularies(vocabularies: dict[str, ir.Table], root: Path) -> dict[str, FeatureInfo]:
    (root / "vocab").mkdir()
    sizes = {}
    for name, words in vocabularies.items():
        table = words.order_by("id").to_pyarrow()
        path = root / "vocab" / f"{name}.parquet"
        pq.write_table(table, path, compression="zstd", write_page_checksum=True)
        sizes[name] = FeatureInfo(rows=table.num_rows + 1)
    return sizes


def _report(
    events: ir.Table, found: ir.Table, splits: dict[str, SplitInfo], config: IngestConfig
) -> dict[str, Any]:
    kept = found.history_end >= config.requests.min_history
    end = found.history_end
    lengths = {f"p{q}": end.quantile(q / 100, where=kept) for q in (50, 90, 99)}
    requests = found.aggregate(
        users=found.user_id.nunique(where=kept), short=(~kept).sum(), max=end.max(where=kept), **lengths
    )
    counted = requests.to_pyarrow().to_pylist()[0]
    totals = events.aggregate(
        events=events.count(), users=events.user_id.nunique(), without=events.request_id.isnull().sum()
    )
    total = totals.to_pyarrow().to_pylist()[0]
    positives = sum(info.positives for info in splits.values())
    candidates = sum(info.candidates for info in splits.values())
    return {
        "events": int(total["events"]),
        "event_users": int(total["users"]),
        "request_users": int(counted["users"]),
        "history_length": {name: int(counted[name]) for name in (*lengths, "max")},
        "dropped": {
            "events_without_request": int(total["without"]),
            "requests_below_min_history": int(counted["short"]),
            "negatives_not_found": positives * (config.requests.negatives + 1) - candidates,
        },
    }


def report_lines(manifest: LogManifest) -> list[str]:
    """The manifest for people: one line a split, then history lengths and what was left out."""
    report = manifest.report
    lines = [
        f"{report['events']:,} events of {report['event_users']:,} users;"
        f" requests of {report['request_users']:,} users"
    ]
    for name, info in manifest.splits.items():
        lines.append(
            f"{name:<10} {info.rows:>9,} rows (users) {info.requests:>11,} requests"
            f" {info.candidates:>12,} candidates {info.positives:>11,} positives"
        )
    lengths = ", ".join(f"{name} {value:,}" for name, value in report["history_length"].items())
    lines.append(f"history length at request: {lengths}")
    lines += [f"dropped: {count:,} {reason.replace('_', ' ')}" for reason, count in report["dropped"].items()]
    lines += [f"{name}: {info.rows:,} table rows" for name, info in manifest.features.items()]
    return lines
