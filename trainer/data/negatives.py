"""Seeded negatives, drawn in proportion to how often an item occurs among past events."""

from __future__ import annotations

from collections.abc import Sequence

import ibis
from ibis.expr import types as ir

from trainer.data.ingest_config import IngestConfig
from trainer.data.portable_hash import number
from trainer.data.protocol import REQUEST, Tables


def one_positive(tables: Tables, asked: ir.Table, config: IngestConfig) -> ir.Table:
    """The candidates of requests that carry their one positive as `item_id`: it, and `negatives` others.

    Negatives are no item that the user ever has, before or after (`requests.exclude = "request"`: no item
    that the user has in the second of the request).
    """
    events = tables.events
    wanted = asked.select(*REQUEST, wanted=ibis.literal(config.requests.negatives).cast("int64"))
    if config.requests.exclude == "user" or config.protocol == "leave-last":
        theirs = events.semi_join(asked, "user_id")
        others = draw(wanted, theirs.select("user_id", "item_id").distinct(), ["user_id"], tables, config)
    else:
        seconds = asked.select(*REQUEST, "timestamp")
        beside = events.drop("request_id").inner_join(seconds, ["user_id", "timestamp"])
        others = draw(wanted, beside.select(*REQUEST, "item_id").distinct(), REQUEST, tables, config)
    return ibis.union(labelled(asked, 1, config.task), labelled(others, 0, config.task))


def labelled(items: ir.Table, label: int, task: str) -> ir.Table:
    """user_id, request_id, item_id and the label of the task."""
    return items.select(*REQUEST, "item_id", **{f"label_{task}": ibis.literal(label).cast("float32")})


def draw(
    wanted: ir.Table, refused: ir.Table, keys: Sequence[str], tables: Tables, config: IngestConfig
) -> ir.Table:
    """user_id, request_id, item_id: `wanted` different items a request, none of those refused.

    A request that meets too many refused items gets fewer.

    Args:
        wanted: user_id, request_id, wanted.
        refused: the columns `keys` and item_id.
    """
    # Half as many again, and eight, replace the draws that are refused or meet one another.
    drawn = wanted.mutate(draw=ibis.range(0, wanted.wanted + wanted.wanted // 2 + 8).unnest())
    drawn = _draw_events(drawn, tables.popularity, config.seed)
    drawn = drawn.anti_join(refused, [*keys, "item_id"])
    once = drawn.group_by([*REQUEST, "item_id"]).aggregate(draw=drawn.draw.min(), wanted=drawn.wanted.max())
    once = once.mutate(place=ibis.row_number().over(group_by=REQUEST, order_by=once.draw))
    return once.filter(once.place < once.wanted)


def _draw_events(drawn: ir.Table, popularity: ir.Table, seed: int) -> ir.Table:
    """Adds the item of a uniformly drawn past event to each draw.

    The past events are numbered item by item, so that a number needs no order among the events of
    one item: an item of count c owns c numbers, one after the other.
    """
    owned = popularity.filter(popularity["count"] > 0)
    last = owned["count"].cumsum(order_by=owned.item_id).cast("int64")
    owned = owned.mutate(first=last - owned["count"])
    numbers = owned.mutate(offset=ibis.range(0, owned["count"]).unnest())
    numbers = numbers.select("item_id", number=numbers.first + numbers.offset)
    value = number(seed, "negative", drawn.user_id, drawn.request_id, drawn.draw)
    drawn = drawn.mutate(value=value).cross_join(owned.aggregate(total=owned["count"].sum().cast("int64")))
    drawn = drawn.mutate(number=drawn.value % drawn.total)
    return drawn.inner_join(numbers, "number").select(*REQUEST, "wanted", "draw", "item_id")
