"""The `next-basket` protocol: a request is a basket, its candidates are bought and popular items.

Both functions take and give Ibis tables and run on any engine. Events have the columns user_id,
request_id, timestamp and item_id; ids are dense, `request_id` may be null.
"""

from __future__ import annotations

import ibis
from ibis.expr import types as ir

from trainer.data.ingest_config import IngestConfig
from trainer.data.portable_hash import digest, number

REQUEST = ("user_id", "request_id")


def requests(events: ir.Table) -> ir.Table:
    """user_id, request_id, timestamp: one row a basket.

    A basket with several timestamps happens at its first one, so that none of its own events can
    be earlier than it. Events without a request id are behaviours only.
    """
    baskets = events.filter(events.request_id.notnull())
    return baskets.group_by(REQUEST).aggregate(timestamp=baskets.timestamp.min())


def candidates(events: ir.Table, asked: ir.Table, popularity: ir.Table, config: IngestConfig) -> ir.Table:
    """user_id, request_id, item_id, label: up to `positives` bought items, `negatives` others for each.

    Args:
        events: all events.
        asked: the requests that want candidates.
        popularity: item_id, count: how many events before the validation split have the item.
    """
    keys = asked.select(*REQUEST)
    basket = events.inner_join(keys, REQUEST).select(*REQUEST, "item_id").distinct()
    order = digest(config.seed, "positive", basket.user_id, basket.request_id, basket.item_id)
    place = ibis.row_number().over(group_by=REQUEST, order_by=order)
    bought = basket.mutate(place=place)
    bought = bought.filter(bought.place < config.requests.positives).drop("place")
    return ibis.union(_labelled(bought, 1), _labelled(_negatives(bought, basket, popularity, config), 0))


def _labelled(items: ir.Table, label: int) -> ir.Table:
    return items.select(*REQUEST, "item_id", label=ibis.literal(label))


def _negatives(bought: ir.Table, basket: ir.Table, popularity: ir.Table, config: IngestConfig) -> ir.Table:
    """The first wanted draws that are not in the basket and not drawn before, per request."""
    wanted = bought.group_by(REQUEST).aggregate(wanted=bought.count() * config.requests.negatives)
    # Half as many again, and eight, replace the draws that meet the basket or one another.
    drawn = wanted.mutate(draw=ibis.range(0, wanted.wanted + wanted.wanted // 2 + 8).unnest())
    drawn = _draw_events(drawn, popularity, config.seed)
    drawn = drawn.anti_join(basket, [*REQUEST, "item_id"])
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
