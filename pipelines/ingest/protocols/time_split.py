"""The `time-split` protocol: every event is a request for its own item; the date decides the split."""

from __future__ import annotations

from ibis.expr import types as ir

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.negatives import one_positive
from pipelines.ingest.protocols.protocol import Tables, positions

__all__ = ["one_positive", "requests"]


def requests(tables: Tables, config: IngestConfig) -> ir.Table:
    """user_id, request_id, timestamp, item_id: one row an event.

    The request id is the number of the user's events before this one. Which requests are kept
    (`min_history`, `per_user`) is decided where histories are counted.
    """
    placed = positions(tables.events, config)
    return placed.select("user_id", "timestamp", "item_id", request_id=placed.position)
