"""The `impressions` protocol: the requests, candidates and labels that were logged."""

from __future__ import annotations

from ibis.expr import types as ir

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.protocols.protocol import REQUEST, Tables


def requests(tables: Tables, config: IngestConfig) -> ir.Table:
    """user_id, request_id, timestamp, context_*: one row a request.

    A request whose rows differ in time happened at the earliest; where they differ in context, the
    largest value counts.
    """
    shown = _shown(tables)
    context = {
        f"context_{entry.name}": shown[f"context_{entry.name}"].max() for entry in config.shown_context
    }
    return shown.group_by(REQUEST).aggregate(timestamp=shown.timestamp.min(), **context)


def candidates(tables: Tables, asked: ir.Table, config: IngestConfig) -> ir.Table:
    """user_id, request_id, item_id, label_* and what else an impression says of its candidate."""
    shown = _shown(tables).semi_join(asked, REQUEST)
    return shown.drop("timestamp", *(f"context_{entry.name}" for entry in config.shown_context))


def _shown(tables: Tables) -> ir.Table:
    if tables.shown is None:
        raise ValueError("the impressions protocol was called without its table")
    return tables.shown
