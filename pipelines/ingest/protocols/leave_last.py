"""The `leave-last` protocol of the DARE papers: targets at fixed distances from a user's last event."""

from __future__ import annotations

import ibis
from ibis.expr import types as ir

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.negatives import one_positive
from pipelines.ingest.protocols.protocol import Tables, positions

__all__ = ["one_positive", "requests"]


def requests(tables: Tables, config: IngestConfig) -> ir.Table:
    """user_id, request_id, timestamp, item_id, split: one row a target of a user with `min_events` events.

    The last event (distance 1) tests, the one before validates, those at `distances` train. The request id
    is the number of events before the target. Events of the target's second are not in its history,
    whatever their order.
    """
    events = tables.events
    sizes = events.group_by("user_id").aggregate(size=events.count())
    active = sizes.filter(sizes["size"] >= config.requests.min_events)
    placed = positions(events.semi_join(active, "user_id"), config).inner_join(active, "user_id")
    placed = placed.mutate(distance=placed["size"] - placed.position)
    targets = placed.filter(placed.distance.isin([1, 2, *config.requests.distances]))
    split = ibis.cases((targets.distance == 1, "test"), (targets.distance == 2, "validation"), else_="train")
    return targets.select("user_id", "timestamp", "item_id", request_id=targets.position, split=split)
