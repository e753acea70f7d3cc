"""The `next-basket` protocol: a request is a basket, its candidates are bought and popular items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import ibis
from ibis.expr import types as ir

from pipelines.ingest.engine import Engine, count_rows
from pipelines.ingest.portable_hash import digest
from pipelines.ingest.protocols.negatives import draw, positives, with_label
from pipelines.ingest.protocols.protocol import REQUEST, RequestProtocol, Tables

if TYPE_CHECKING:
    from pipelines.ingest.config import IngestConfig

_DAY = 86_400


class NextBasket(RequestProtocol):
    """Every basket is a request for its items."""

    settings = frozenset({"positives", "negatives"})
    reads_request_ids = True
    remark_words: ClassVar[Mapping[str, str]] = {
        "baskets_longer_than_a_day": "the first time counts; an id that is used again is one basket"
    }

    def most_positives(self, config: IngestConfig) -> int:
        return config.requests.positives

    def requests(self, tables: Tables, config: IngestConfig) -> ir.Table:
        """user_id, request_id, timestamp: one row for each basket.

        A basket with several timestamps happens at its first one, so that none of its own events can
        be earlier than it. Events without a request id are behaviors only.
        """
        baskets = _in_baskets(tables.events)
        return baskets.group_by(REQUEST).aggregate(timestamp=baskets.timestamp.min())

    def candidates(self, tables: Tables, asked: ir.Table, config: IngestConfig) -> ir.Table:
        """user_id, request_id, item_id, label_*: bought items, and `negatives` others beside each."""
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
        return ibis.union(with_label(bought, 1, config.task), with_label(others, 0, config.task))

    def remarks(self, engine: Engine, events: ir.Table, config: IngestConfig) -> dict[str, int]:
        if not config.events.request:
            return {}
        known = _in_baskets(events)
        length = known.timestamp.max() - known.timestamp.min()
        baskets = known.group_by(REQUEST).aggregate(length=length)
        return {"baskets_longer_than_a_day": count_rows(engine, baskets.filter(baskets["length"] > _DAY))}


def _in_baskets(events: ir.Table) -> ir.Table:
    return events.filter(events.request_id.notnull())
