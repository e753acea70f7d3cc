"""Seeded negatives, drawn in proportion to how often an item occurs among the events before the request.

All events so far count, or those of the last `requests.popularity_days` days alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import ibis
from ibis.expr import types as ir

from pipelines.ingest.portable_hash import number
from pipelines.ingest.protocols.protocol import REQUEST, Past, Tables

if TYPE_CHECKING:
    from pipelines.ingest.config import IngestConfig

_HOUR, _DAY = 3600, 86_400


def one_positive(
    tables: Tables, asked: ir.Table, config: IngestConfig, exclude: Literal["user", "request"]
) -> ir.Table:
    """The candidates of requests that carry their one positive as `item_id`: it, and `negatives` others.

    Args:
        exclude: `user`: negatives are no item that the user ever has, before or after the request;
            `request`: they are no item that the user has in the second of the request.
    """
    events = tables.events
    asked = positives(asked, tables, config)
    wanted = ibis.literal(config.requests.negatives).cast("int64")
    wanted = asked.select(*REQUEST, "timestamp", wanted=wanted)
    if exclude == "user":
        theirs = events.semi_join(asked, "user_id")
        others = draw(wanted, theirs.select("user_id", "item_id").distinct(), ["user_id"], tables, config)
    else:
        seconds = asked.select(*REQUEST, "timestamp")
        beside = events.drop("request_id").inner_join(seconds, ["user_id", "timestamp"])
        others = draw(wanted, beside.select(*REQUEST, "item_id").distinct(), REQUEST, tables, config)
    return ibis.union(with_label(asked, 1, config.task), with_label(others, 0, config.task))


def with_label(items: ir.Table, label: int, task: str) -> ir.Table:
    """user_id, request_id, item_id and the label of the task."""
    return items.select(*REQUEST, "item_id", **{f"label_{task}": ibis.literal(label).cast("float32")})


def positives(items: ir.Table, tables: Tables, config: IngestConfig) -> ir.Table:
    """The positives (item_id, timestamp, ...) that `requests.new_items` keeps."""
    if config.requests.new_items == "keep":
        return items
    known = items.inner_join(_past(tables).items, "item_id")
    return known.filter(known.since < known.timestamp).select(*items.columns)


def past_events(events: ir.Table, days: int = 0) -> Past:
    """Numbers the events of all users. Each table is computed where it is used, so keep them first.

    The order inside a second is that of the items, so that the numbers below a request's do not change
    with what happens later. Hours bound what a window function sorts at once.

    Args:
        days: older events than so many days before a second are gone for it; 0: none ever is.
    """
    events = events.select("timestamp", "item_id", hour=events.timestamp // _HOUR)
    since = events.group_by("item_id").aggregate(since=events.timestamp.min())
    seconds = events.group_by(["hour", "timestamp"]).aggregate(size=events.count())
    place = ibis.row_number().over(group_by="hour", order_by=[events.timestamp, events.item_id])
    placed = events.mutate(place=place.cast("int64")).inner_join(_hours_before(seconds), "hour")
    placed = placed.select("item_id", number=placed.before + placed.place)
    numbers, none = _counts_before(seconds), ibis.literal(0).cast("int64")
    if not days:
        return Past(placed, numbers.mutate(gone=none), since)
    begin = seconds.timestamp - days * _DAY
    begins = seconds.select(hour=begin // _HOUR, timestamp=begin, size=none)
    begun = _counts_before(ibis.union(seconds, begins)).rename(begin="timestamp", gone="earlier")
    numbers = numbers.mutate(begin=numbers.timestamp - days * _DAY).inner_join(begun, "begin").drop("begin")
    return Past(placed, numbers, since)


def _hours_before(seconds: ir.Table) -> ir.Table:
    """hour, before: the events before each hour; `seconds`: hour, size."""
    hours = seconds.group_by("hour").aggregate(size=seconds["size"].sum().cast("int64"))
    before = hours["size"].cumsum(order_by=hours.hour).cast("int64") - hours["size"]
    return hours.select("hour", before=before)


def _counts_before(marks: ir.Table) -> ir.Table:
    """timestamp, earlier: the events strictly before each second.

    Args:
        marks: hour, timestamp, size: the events of a second; one may be there twice.
    """
    seconds = marks.group_by(["hour", "timestamp"]).aggregate(size=marks["size"].sum().cast("int64"))
    so_far = seconds["size"].cumsum(group_by="hour", order_by=seconds.timestamp).cast("int64")
    seconds = seconds.mutate(within=so_far - seconds["size"]).inner_join(_hours_before(marks), "hour")
    return seconds.select("timestamp", earlier=seconds.before + seconds.within)


def draw(
    wanted: ir.Table, refused: ir.Table, keys: Sequence[str], tables: Tables, config: IngestConfig
) -> ir.Table:
    """user_id, request_id, item_id: `wanted` different items for each request, none of those refused.

    A request that meets too many refused items, or few earlier events, gets fewer.

    Args:
        wanted: user_id, request_id, timestamp (of some event), wanted.
        refused: the columns `keys` and item_id.
    """
    wanted = wanted.inner_join(_past(tables).seconds, "timestamp").drop("timestamp")
    wanted = wanted.mutate(recent=wanted.earlier - wanted.gone).filter(ibis._.recent > 0)
    # Half as many again, and eight, replace the draws that are refused or meet one another.
    drawn = wanted.mutate(draw=ibis.range(0, wanted.wanted + wanted.wanted // 2 + 8).unnest())
    value = number(config.seed, "negative", drawn.user_id, drawn.request_id, drawn.draw)
    # An engine may compute the remainder before it filters.
    drawn = drawn.mutate(number=drawn.gone + value % ibis.greatest(drawn.recent, 1))
    drawn = drawn.drop("earlier", "gone", "recent")
    drawn = drawn.inner_join(_past(tables).events, "number")
    drawn = drawn.anti_join(refused, [*keys, "item_id"])
    once = drawn.group_by([*REQUEST, "item_id"]).aggregate(draw=drawn.draw.min(), wanted=drawn.wanted.max())
    once = once.mutate(place=ibis.row_number().over(group_by=REQUEST, order_by=once.draw))
    return once.filter(once.place < once.wanted)


def _past(tables: Tables) -> Past:
    if tables.past is None:
        raise ValueError("negatives are drawn from the past events, which nobody has numbered")
    return tables.past
