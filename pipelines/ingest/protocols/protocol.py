"""What the request protocols share: the tables they are given, and the order of a user's events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import ibis
from ibis.expr import types as ir

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.portable_hash import digest

REQUEST = ("user_id", "request_id")


@dataclass(frozen=True)
class Past:
    """The events of all users in the order of time, from which negatives are drawn.

    Attributes:
        numbered: number (from 0, by second), item_id: one row an event.
        seconds: timestamp, earlier: the number of events strictly before each second that has one.
        items: item_id, since: the second of the item's first event.
    """

    numbered: ir.Table
    seconds: ir.Table
    items: ir.Table


@dataclass(frozen=True)
class Tables:
    """Encoded tables: ids are dense integers, 0 for null; multi-valued features are lists of them.

    Attributes:
        events: user_id, request_id (may be null), timestamp, one column a behavior's feature.
        shown: the impressions, one row a candidate: user_id, request_id, timestamp, item_id, label_*, ...
        past: only for protocols that draw candidates.
        items: item_id and the features that a table of items gives.
        users: user_id and the context_* that a table of users gives.
    """

    events: ir.Table
    shown: ir.Table | None = None
    past: Past | None = None
    items: ir.Table | None = None
    users: ir.Table | None = None

    def of_buckets(self, first: int, end: int) -> Tables:
        """Of the users of the buckets from `first` to before `end`; what all users share stays whole."""

        def some(table: ir.Table) -> ir.Table:
            if "bucket" not in table.columns:
                return table
            return table.filter((table.bucket >= first) & (table.bucket < end)).drop("bucket")

        shown = None if self.shown is None else some(self.shown)
        return replace(self, events=some(self.events), shown=shown)


@dataclass(frozen=True)
class RequestProtocol:
    """What makes one way of asking differ from another; everything else is shared.

    Attributes:
        requests: gives user_id, request_id, timestamp, and what `candidates` wants to know besides; a `split`
            column overrides the split by time.
        candidates: gives user_id, request_id, item_id and label_*, one row a candidate, for the requests.
    """

    requests: Callable[[Tables, IngestConfig], ir.Table]
    candidates: Callable[[Tables, ir.Table, IngestConfig], ir.Table]


def tie(events: ir.Table, seed: int) -> ir.StringValue:
    """Orders the events of one second, which have no order of their own; logs often sort them by item id."""
    return digest(seed, "tie", events.user_id, events.timestamp, events.item_id)


def behavior_features(config: IngestConfig) -> list[str]:
    """The features that an encoded event has, in the order of the log's columns."""
    return [feature.name for feature in config.all_features if feature.side != "candidate"]


def positions(events: ir.Table, config: IngestConfig) -> ir.Table:
    """Adds `position`, the number of the user's events before this one in the order of the histories."""
    order = [
        events.timestamp,
        tie(events, config.seed),
        *(events[name] for name in behavior_features(config)),
    ]
    return events.mutate(position=ibis.row_number().over(group_by="user_id", order_by=order).cast("int64"))
