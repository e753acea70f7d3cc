"""The `leave-last` protocol of the DARE papers: targets at fixed distances from a user's last event."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ibis
from ibis.expr import types as ir

from pipelines.ingest.engine import Engine
from pipelines.ingest.protocols.negatives import one_positive
from pipelines.ingest.protocols.protocol import RequestProtocol, Tables, positions

if TYPE_CHECKING:
    from pipelines.ingest.config import IngestConfig


class LeaveLast(RequestProtocol):
    """Of users with `min_events` events, the last one tests, the one before validates, earlier ones train."""

    settings = frozenset({"negatives", "min_events", "distances"})
    needs_split = False

    def requests(self, tables: Tables, config: IngestConfig) -> ir.Table:
        """user_id, request_id, timestamp, item_id, split: one row for each target.

        The last event (distance 1) tests, the one before validates, those at `distances` train. The request
        id is the number of events before the target. Events of the target's second are not in its history,
        whatever their order.
        """
        events = tables.events
        sizes = _sizes(events)
        active = sizes.filter(sizes["size"] >= config.requests.min_events)
        placed = positions(events.semi_join(active, "user_id"), config).inner_join(active, "user_id")
        placed = placed.mutate(distance=placed["size"] - placed.position)
        targets = placed.filter(placed.distance.isin([1, 2, *config.requests.distances]))
        split = ibis.cases(
            (targets.distance == 1, "test"), (targets.distance == 2, "validation"), else_="train"
        )
        return targets.select("user_id", "timestamp", "item_id", request_id=targets.position, split=split)

    def candidates(self, tables: Tables, asked: ir.Table, config: IngestConfig) -> ir.Table:
        """The target, and `negatives` items that the user never has."""
        return one_positive(tables, asked, config, exclude="user")

    def without_requests(self, config: IngestConfig) -> str:
        return f"no user has {config.requests.min_events} events; lower requests.min_events"

    def dropped(self, engine: Engine, events: ir.Table, config: IngestConfig) -> dict[str, int]:
        sizes = _sizes(events)
        few = (sizes["size"] < config.requests.min_events).cast("int64").sum()
        return {"users_below_min_events": int(engine.rows(sizes.aggregate(few=few))[0]["few"] or 0)}


def _sizes(events: ir.Table) -> ir.Table:
    """user_id, size: the number of the user's events."""
    return events.group_by("user_id").aggregate(size=events.count())
