"""The `time-split` protocol: every event is a request for its own item; the date decides the split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ibis.expr import types as ir

from pipelines.ingest.protocols.negatives import one_positive
from pipelines.ingest.protocols.protocol import RequestProtocol, Tables, positions

if TYPE_CHECKING:
    from pipelines.ingest.config import IngestConfig


class TimeSplit(RequestProtocol):
    """Every event is a request, and its item the one positive."""

    settings = frozenset({"negatives", "exclude"})

    def requests(self, tables: Tables, config: IngestConfig) -> ir.Table:
        """user_id, request_id, timestamp, item_id: one row for each event.

        The request id is the number of the user's events before this one. Which requests are kept
        (`min_history`, `per_user`) is decided where histories are counted.
        """
        placed = positions(tables.events, config)
        return placed.select("user_id", "timestamp", "item_id", request_id=placed.position)

    def candidates(self, tables: Tables, asked: ir.Table, config: IngestConfig) -> ir.Table:
        """The event's item, and `negatives` others."""
        return one_positive(tables, asked, config, config.requests.exclude)
