"""The `next-basket` protocol: a request is a basket, its candidates are bought and popular items."""

from __future__ import annotations

import ibis
from ibis.expr import types as ir

from trainer.data.ingest_config import IngestConfig
from trainer.data.negatives import draw, labelled
from trainer.data.portable_hash import digest
from trainer.data.protocol import REQUEST, Tables


def requests(tables: Tables, config: IngestConfig) -> ir.Table:
    """user_id, request_id, timestamp: one row a basket.

    A basket with several timestamps happens at its first one, so that none of its own events can
    be earlier than it. Events without a request id are behaviours only.
    """
    del config
    baskets = tables.events.filter(tables.events.request_id.notnull())
    return baskets.group_by(REQUEST).aggregate(timestamp=baskets.timestamp.min())


def candidates(tables: Tables, asked: ir.Table, config: IngestConfig) -> ir.Table:
    """user_id, request_id, item_id, label: up to `positives` bought items, `negatives` others for each."""
    keys = asked.select(*REQUEST)
    basket = tables.events.inner_join(keys, REQUEST).select(*REQUEST, "item_id").distinct()
    order = digest(config.seed, "positive", basket.user_id, basket.request_id, basket.item_id)
    place = ibis.row_number().over(group_by=REQUEST, order_by=order)
    bought = basket.mutate(place=place)
    bought = bought.filter(bought.place < config.requests.positives).drop("place")
    wanted = bought.group_by(REQUEST).aggregate(wanted=bought.count() * config.requests.negatives)
    others = draw(wanted, basket, REQUEST, tables, config)
    return ibis.union(labelled(bought, 1, config.task), labelled(others, 0, config.task))
