"""The `next-basket` protocol: a request is a basket, its candidates are bought and popular items."""

from __future__ import annotations

import ibis
from ibis.expr import types as ir

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.negatives import draw, labelled, positives
from pipelines.ingest.portable_hash import digest
from pipelines.ingest.protocols.protocol import REQUEST, Tables


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
    keys = asked.select(*REQUEST, "timestamp")
    basket = tables.events.drop("timestamp").inner_join(keys, REQUEST)
    basket = basket.select(*REQUEST, "timestamp", "item_id").distinct()
    bought = positives(basket, tables, config)
    order = digest(config.seed, "positive", bought.user_id, bought.request_id, bought.item_id)
    bought = bought.mutate(place=ibis.row_number().over(group_by=REQUEST, order_by=order))
    bought = bought.filter(bought.place < config.requests.positives).drop("place")
    wanted = bought.group_by([*REQUEST, "timestamp"]).aggregate(
        wanted=bought.count() * config.requests.negatives
    )
    others = draw(wanted, basket, REQUEST, tables, config)
    return ibis.union(labelled(bought, 1, config.task), labelled(others, 0, config.task))
