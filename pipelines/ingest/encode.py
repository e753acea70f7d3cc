"""The relational middle of ingest: vocabularies, encoded tables, timed requests and their candidates.

All functions take and give Ibis tables and run on any engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import ibis
from ibis.expr import types as ir

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.portable_hash import digest
from pipelines.ingest.protocols.protocol import REQUEST, Tables

_HEX = "0123456789abcdef"
_PREFIX = 4  # hexadecimal digits of the row key that choose a bucket


def counted(name: str, multi: bool, sources: Sequence[ir.Table], cutoff: int | None) -> ir.Table:
    """value, count, occurrences: the different values of a column; no null is one.

    Args:
        sources: the tables with the column `name`. `occurrences` counts in all of them, `count` in the first
            only, and there the events before the Unix second `cutoff` (None: all).
    """
    parts = []
    for number, table in enumerate(sources):
        counts = ibis.literal(number == 0) & (True if cutoff is None else table.timestamp < cutoff)
        values = table[name].unnest() if multi else table[name]
        parts.append(table.select(value=values, counted=counts.fill_null(False).cast("int64")))
    everything = reduce(lambda left, right: left.union(right), parts)
    known = everything.filter(everything["value"].notnull())
    return known.group_by("value").aggregate(
        count=known.counted.sum().cast("int64"), occurrences=known.count().cast("int64")
    )


def numbered(values: ir.Table, first: int) -> ir.Table:
    """value, id, count: dense ids from `first` in the order of the values."""
    dense = ibis.row_number().over(order_by=values["value"]) + first
    return values.mutate(id=dense.cast("int64")).select("value", "id", "count")


def _or_nothing(ids: ir.Value, multi: bool) -> ir.Value:
    return ibis.coalesce(ids, no_ids()) if multi else ids.fill_null(0)


def no_ids() -> ir.ArrayValue:
    """An empty list of ids."""
    return ibis.literal([], type="array<int64>")


def bucketed(raw: ir.Table, buckets: int, seed: int) -> ir.Table:
    """Adds `bucket` to a table with user_id; in the order of the buckets, so that one is read alone."""
    if buckets == 1:
        return raw
    key = digest(seed, "row", raw.user_id)
    digits = [ibis.literal(_HEX).find(key.substr(place, 1)) for place in range(_PREFIX)]
    prefix = reduce(lambda value, digit: value * 16 + digit, digits, ibis.literal(0).cast("int64"))
    return raw.mutate(bucket=(prefix * buckets // 16**_PREFIX).cast("int64")).order_by("bucket")


def trial_users(requests: ir.Table, config: IngestConfig) -> ir.Table:
    """user_id of the `config.users` users whose requests a trial log keeps."""
    users = requests.select("user_id").distinct()
    return users.order_by(digest(config.seed, "user", users.user_id)).limit(config.users)


def timed_requests(
    tables: Tables, requests: ir.Table, users: ir.Table | None, config: IngestConfig
) -> ir.Table:
    """Adds history_end, the number of the user's events strictly before the request, and the split.

    Context of the user comes from the newest event before the request; of several in that second the
    largest value counts.

    Args:
        users: those of `trial_users`; None: all.
    """
    events = tables.events
    if users is not None:
        requests = requests.semi_join(users, "user_id")
    asked = requests.select("user_id", "timestamp", events=ibis.literal(0).cast("int64"))
    happened = events.select("user_id", "timestamp", events=ibis.literal(1).cast("int64"))
    marks = ibis.union(happened.semi_join(asked, "user_id"), asked)
    seconds = marks.group_by(["user_id", "timestamp"]).aggregate(happened=marks.events.sum())
    so_far = seconds.happened.cumsum(group_by="user_id", order_by="timestamp")
    busy = (seconds.happened > 0).cast("int64")
    busy_so_far = busy.cumsum(group_by="user_id", order_by="timestamp")
    earlier = seconds.select(
        "user_id",
        "timestamp",
        history_end=(so_far - seconds.happened).cast("int64"),
        seconds=(busy_so_far - busy).cast("int64"),
    )
    timed = requests.inner_join(earlier, ["user_id", "timestamp"])
    timed = _with_user_context(timed, events, config).drop("seconds")
    timed = _with_user_table(timed, tables.users, config)
    return timed if "split" in timed.columns else timed.mutate(split=_split(timed, config))


def _split(timed: ir.Table, config: IngestConfig) -> ir.Value:
    if config.split is None:
        raise ValueError("a protocol without its own split needs the dates of one")
    return ibis.cases(
        (timed.timestamp < config.split.validation_start, "train"),
        (timed.timestamp < config.split.test_start, "validation"),
        else_="test",
    )


def _with_user_context(timed: ir.Table, events: ir.Table, config: IngestConfig) -> ir.Table:
    """Adds context_* from the user's second number `seconds`, the last one before the request."""
    if not config.event_context:
        return timed
    names = [f"context_{entry.name}" for entry in config.event_context]
    grouped = events.group_by(["user_id", "timestamp"])
    states = grouped.aggregate(**{name: events[name].max() for name in names})
    number = ibis.row_number().over(group_by="user_id", order_by=states.timestamp) + 1
    states = states.mutate(seconds=number.cast("int64")).drop("timestamp")
    joined = timed.left_join(states, ["user_id", "seconds"], rname="{name}_right")
    multi = {f"context_{entry.name}": entry.multi for entry in config.event_context}
    return joined.select(*timed.columns, **{name: _or_nothing(joined[name], multi[name]) for name in names})


def _with_user_table(timed: ir.Table, users: ir.Table | None, config: IngestConfig) -> ir.Table:
    """Adds context_* of the table of users; a user whom it lacks has no value."""
    if users is None:
        return timed
    theirs = users.rename(_user="user_id")
    joined = timed.left_join(theirs, timed.user_id == theirs["_user"])
    multi = {f"context_{entry.name}": entry.multi for entry in config.user_context}
    return joined.select(*timed.columns, **{name: _or_nothing(joined[name], multi[name]) for name in multi})


def kept_requests(found: ir.Table, config: IngestConfig) -> ir.Table:
    """The requests with enough history, at most `requests.per_user` of a user in a split."""
    asked = found.filter(found.history_end >= config.requests.min_history)
    if not config.requests.per_user:
        return asked
    order = [digest(config.seed, "request", asked.user_id, asked.request_id)]
    place = ibis.row_number().over(group_by=["user_id", "split"], order_by=order)
    asked = asked.mutate(place=place)
    return asked.filter(asked.place < config.requests.per_user).drop("place")


def offers(asked: ir.Table, candidates: ir.Table, config: IngestConfig) -> ir.Table:
    """The asked requests with `bucket`, `candidates` (a list of structs in seeded order) and their number.

    Args:
        candidates: user_id, request_id, item_id, label_*, and all that the log says of a candidate.
    """
    # Without a shuffle a model could tell a positive by its place in the list.
    order = digest(config.seed, "candidate", candidates.user_id, candidates.request_id, candidates.item_id)
    names = [feature.name for feature in config.all_features if feature.side != "history"]
    names += [name for name in candidates.columns if name not in (*REQUEST, *names)]
    nested = candidates.group_by(REQUEST).aggregate(
        candidates=ibis.struct({"_order": order, **{name: candidates[name] for name in names}}).collect(),
        num_candidates=candidates.count(),
    )
    nested = nested.mutate(candidates=nested.candidates.sort())
    context = [f"context_{entry.name}" for entry in config.context]
    wanted = asked.select(*REQUEST, "timestamp", "history_end", "split", "bucket", *context)
    return wanted.inner_join(nested, REQUEST)
