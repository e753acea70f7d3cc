"""Histories and requests become the nested rows of the sequence log, in their final order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ibis.expr import types as ir

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.encode import no_ids
from pipelines.ingest.engine import Engine
from pipelines.ingest.portable_hash import digest
from pipelines.ingest.protocols.protocol import behavior_features, tie

# Spark and DuckDB hold a behavior being sorted as a struct of its features, its time and a text.
_BYTES_PER_BEHAVIOR, _BYTES_PER_ID = 160, 48
_BYTES_PER_DRAW, _BYTES_PER_REFUSED = 64, 24
_SHARE = 4  # of the memory limit that one bucket may take
_WAITING = 32  # 1 / 32 of the memory limit holds rows that wait for their part of the new order


@dataclass(frozen=True)
class BlockWriter:
    """Gives the rows of a split in their final order, with memory for one bucket of users at a time.

    Attributes:
        known: feature -> the rows of its vocabulary; larger ids are written as 0.
    """

    engine: Engine
    events: ir.Table
    offered: ir.Table
    config: IngestConfig
    buckets: int
    spill: Path
    known: Mapping[str, int]

    def prepare(self) -> None:
        """Nests the histories of one bucket after the other; all splits use them."""
        for bucket in range(self.buckets):
            events, offered = self._of(self.events, bucket), self._of(self.offered, bucket)
            self.engine.keep(_past(bucket), histories(events, offered, self.config, self.known))

    def rows(self, split: str) -> Iterator[pa.RecordBatch]:
        """The rows of one split, in the columns of `schema_of` (and perhaps more)."""
        offered, size = self.offered.filter(self.offered.split == split), self.config.files.rows_per_group
        if self.config.files.layout == "request" and self.buckets > 1:
            yield from self._shuffled(offered)
            return
        for bucket in range(self.buckets):
            table = self._bucket(offered, bucket)
            ordered = table.order_by([table.row_key, table.user_id])
            yield from self.engine.stream(ordered, size)

    def _of(self, table: ir.Table, bucket: int) -> ir.Table:
        return table.filter(table.bucket == bucket) if self.buckets > 1 else table

    def _bucket(self, offered: ir.Table, bucket: int) -> ir.Table:
        rows = request_rows if self.config.files.layout == "request" else user_rows
        past = self.engine.table(_past(bucket))
        return rows(past, self._of(offered, bucket), self.config, self.known)

    def _shuffled(self, offered: ir.Table) -> Iterator[pa.RecordBatch]:
        """Makes the request rows user by user, writes them into parts by their keys, and sorts each part."""
        keys = offered.select(row_key=row_key(offered, self.config))
        rank = ibis.ntile(self.buckets).over(order_by=keys.row_key)
        firsts = keys.mutate(part=rank).group_by("part").aggregate(first=ibis._.row_key.min())
        # The row keys that separate parts of about equal size.
        limits = sorted(row["first"] for row in self.engine.rows(firsts))[1:]
        folder, size = self.spill / "parts", self.config.files.rows_per_group
        folder.mkdir()
        buckets = (self._bucket(offered, bucket) for bucket in range(self.buckets))
        batches = (batch for table in buckets for batch in self.engine.stream(table, size))
        for path in _scatter(batches, limits, folder, self.config.engine.memory_bytes // _WAITING):
            table = pq.read_table(path)
            path.unlink()
            table = table.sort_by([("row_key", "ascending"), ("user_id", "ascending")])
            yield from table.to_batches(max_chunksize=size)
        folder.rmdir()


def _past(bucket: int) -> str:
    return f"histories_{bucket}"


def _scatter(batches: Iterator[pa.RecordBatch], limits: list[str], folder: Path, waiting: int) -> list[Path]:
    """Writes each row to the part its key belongs to; `waiting`: bytes of rows that wait to be written."""
    paths = [folder / f"part-{part:05d}.parquet" for part in range(len(limits) + 1)]
    edges = np.array(limits, dtype=object)
    with ExitStack() as stack:
        writers: dict[int, pq.ParquetWriter] = {}
        held: dict[int, list[pa.RecordBatch]] = {}

        def write() -> None:
            # All of them: parts are about equal, and a row group of each is as large as can be.
            for part, rows in held.items():
                if part not in writers:
                    writers[part] = stack.enter_context(pq.ParquetWriter(paths[part], rows[0].schema))
                writers[part].write_table(pa.Table.from_batches(rows))
            held.clear()

        size = 0
        for batch in batches:
            keys = batch.column("row_key").to_numpy(zero_copy_only=False)
            parts = np.searchsorted(edges, keys, side="right") if limits else np.zeros(len(keys), np.int64)
            for part in np.unique(parts):
                rows = batch.take(pa.array(np.nonzero(parts == part)[0]))
                held.setdefault(int(part), []).append(rows)
                size += rows.nbytes
            if size > waiting:
                write()
                size = 0
        write()
    return [path for part, path in enumerate(paths) if part in writers]


def auto_buckets(events: int, config: IngestConfig) -> int:
    """How many buckets keep the nested histories of one within the memory limit."""
    if config.engine.buckets:
        return config.engine.buckets
    size = events * (_BYTES_PER_BEHAVIOR + _BYTES_PER_ID * len(config.all_features))
    return min(256, -(-size * _SHARE // config.engine.memory_bytes))


def draw_rounds(asked: int, events: int, buckets: int, config: IngestConfig) -> int:
    """In how many rounds, each for some buckets, candidates are drawn within the memory limit.

    Few are better: every round goes through all numbered events of the past once (see `negatives`).
    """
    wanted = config.request_protocol.most_positives(config) * config.requests.negatives
    draws = wanted + wanted // 2 + 8 if wanted else 0
    size = asked * draws * _BYTES_PER_DRAW + events * _BYTES_PER_REFUSED
    return min(buckets, max(1, -(-size * _SHARE // config.engine.memory_bytes)))


def row_key(offered: ir.Table, config: IngestConfig) -> ir.StringValue:
    """The key by which rows are sorted, then by user; users come into buckets by the key of user rows."""
    if config.files.layout == "user":
        return digest(config.seed, "row", offered.user_id)
    key = digest(config.seed, "row", offered.user_id, offered.request_id)
    return offered.timestamp.cast("string").lpad(11, "0") + key if config.files.order == "time" else key


def histories(
    events: ir.Table, offered: ir.Table, config: IngestConfig, known: Mapping[str, int]
) -> ir.Table:
    """user_id, num_behaviors and history_* of the users with requests, up to their last request."""
    features = behavior_features(config)
    latest = offered.group_by("user_id").aggregate(last=offered.timestamp.max())
    past = events.inner_join(latest, "user_id")
    past = past.filter(past.timestamp < past["last"])
    order = {"timestamp": past.timestamp, "_tie": tie(past, config.seed)}
    behavior = ibis.struct({**order, **{name: past[name] for name in features}})
    nested = past.group_by("user_id").aggregate(history=behavior.collect(), num_behaviors=past.count())
    nested = nested.mutate(history=nested.history.sort())
    lists = {f"history_{name}": _each(nested.history, name, known) for name in (*features, "timestamp")}
    return nested.select("user_id", "num_behaviors", **lists)


def user_rows(past: ir.Table, offered: ir.Table, config: IngestConfig, known: Mapping[str, int]) -> ir.Table:
    """One row a user, all its requests in the order of their time."""
    names = ["timestamp", "request_id", "history_end", "num_candidates"]
    names += [f"context_{entry.name}" for entry in config.context]
    asked = ibis.struct({name: offered[name] for name in (*names, "candidates")})
    blocks = offered.group_by("user_id").aggregate(
        requests=asked.collect(),
        num_requests=offered.count(),
        last_end=offered.history_end.max(),
        num_candidates=offered.num_candidates.sum().cast("int64"),
    )
    blocks = blocks.mutate(requests=blocks.requests.sort())
    fields = _candidate_fields(offered)

    def each_candidate(field: str) -> ir.Value:
        return blocks.requests.map(lambda request: _each(request["candidates"], field, known))

    columns = {
        **{_column(name): _each(blocks.requests, name, {}) for name in names},
        **{_candidate_column(field, config): each_candidate(field) for field in fields},
    }
    kept = ("user_id", "num_requests", "num_candidates", "last_end")
    blocks = blocks.select(*kept, row_key=row_key(blocks, config), **columns)
    rows = _with_histories(blocks, past, config)
    # Another split's requests may see more.
    cut = {name: rows[name][: rows.last_end] for name in rows.columns if _is_history(name)}
    return rows.mutate(**cut, num_behaviors=rows.last_end).drop("last_end")


def request_rows(
    past: ir.Table, offered: ir.Table, config: IngestConfig, known: Mapping[str, int]
) -> ir.Table:
    """One row a request, with the newest behaviors as of its time."""
    names = ["timestamp", "request_id"] + [f"context_{entry.name}" for entry in config.context]
    columns = {_column(name): ibis.array([offered[name]]) for name in names}
    for field in _candidate_fields(offered):
        columns[_candidate_column(field, config)] = ibis.array([_each(offered.candidates, field, known)])
    blocks = offered.select(
        "user_id",
        "history_end",
        "num_candidates",
        num_requests=ibis.literal(1).cast("int64"),
        request_num_candidates=ibis.array([offered.num_candidates]),
        row_key=row_key(offered, config),
        **columns,
    )
    rows = _with_histories(blocks, past, config)
    kept = config.files.max_history
    start = ibis.greatest(rows.history_end - kept, 0) if kept else ibis.literal(0)
    length = (rows.history_end - start).cast("int64")
    cut = {name: rows[name][start : rows.history_end] for name in rows.columns if _is_history(name)}
    return rows.mutate(**cut, num_behaviors=length, request_history_end=ibis.array([length])).drop(
        "history_end"
    )


def _with_histories(blocks: ir.Table, past: ir.Table, config: IngestConfig) -> ir.Table:
    """Joins the histories; a user without one gets empty lists."""
    if config.requests.min_history:
        return blocks.inner_join(past, "user_id")
    rows = blocks.left_join(past, "user_id", rname="{name}_right")
    lists = {name: rows[name] for name in past.columns if _is_history(name)}
    nothing = {
        name: no_ids() if value.type().value_type.is_integer() else ibis.literal([], type=value.type())
        for name, value in lists.items()
    }
    full = {name: ibis.coalesce(value, nothing[name]) for name, value in lists.items()}
    return rows.select(*blocks.columns, num_behaviors=rows.num_behaviors.fill_null(0), **full)


def _is_history(name: str) -> bool:
    return name.startswith("history_") and name != "history_end"


def _each(items: ir.Value, field: str, known: Mapping[str, int]) -> ir.Value:
    """One field of each struct in a list; ids of a feature that `known` does not include become 0."""
    if field not in known:
        return items.map(lambda item: item[field])
    return items.map(lambda item: ibis.ifelse(item[field] < known[field], item[field], 0))


def _candidate_fields(offered: ir.Table) -> list[str]:
    kind = offered.candidates.type().value_type
    return [name for name in kind.names if not name.startswith("_")]


def _column(name: str) -> str:
    if name.startswith("context_"):
        return name
    return name if name.startswith("request_") else f"request_{name}"


def _candidate_column(field: str, config: IngestConfig) -> str:
    features = {feature.name for feature in config.all_features}
    return f"candidate_{field}" if field in features else field
