"""What a request protocol is, and what all of them share: their tables, and the order of a user's events."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import ibis
from ibis.expr import types as ir

from pipelines.ingest.engine import Engine
from pipelines.ingest.portable_hash import digest

if TYPE_CHECKING:
    from pipelines.ingest.config import IngestConfig

REQUEST = ("user_id", "request_id")


@dataclass(frozen=True)
class Past:
    """The events of all users in the order of time, from which negatives are drawn.

    Attributes:
        events: number (from 0, by second), item_id: one row an event.
        seconds: timestamp, earlier, gone: for each second that has an event, how many events are strictly
            before it, and how many of these are too old to count (`requests.popularity_days`).
        items: item_id, since: the second of the item's first event.
    """

    events: ir.Table
    seconds: ir.Table
    items: ir.Table


@dataclass(frozen=True)
class Tables:
    """Encoded tables: ids are dense integers, 0 for null; multi-valued features are lists of them.

    Attributes:
        events: user_id, request_id (may be null), timestamp, one column for each feature of a behavior.
        impressions: user_id, request_id, timestamp, item_id, label_*, ...: one row a candidate.
        past: only for protocols that draw negatives.
        items: item_id and the features that the item table gives.
        users: user_id and the context_* that the user table gives.
    """

    events: ir.Table
    impressions: ir.Table | None = None
    past: Past | None = None
    items: ir.Table | None = None
    users: ir.Table | None = None

    def of_buckets(self, first: int, end: int) -> Tables:
        """The rows of the users in the buckets from `first` to before `end`; shared tables stay whole."""

        def some(table: ir.Table) -> ir.Table:
            if "bucket" not in table.columns:
                return table
            return table.filter((table.bucket >= first) & (table.bucket < end)).drop("bucket")

        impressions = None if self.impressions is None else some(self.impressions)
        return replace(self, events=some(self.events), impressions=impressions)


class RequestProtocol(ABC):
    """One way to make requests of events.

    Everything outside of pipelines/ingest/protocols/ asks these attributes and methods, never a name.
    """

    settings: ClassVar[frozenset[str]] = frozenset()
    """The keys of [requests] that it reads. All read `min_history`, `per_user` and `new_items`, too."""
    needs_split: ClassVar[bool] = True
    """Whether the dates of [split] decide the splits; if not, `requests` gives a column `split`."""
    reads_impressions: ClassVar[bool] = False
    """Whether it needs the table of impressions, whose columns then are the labels."""
    reads_request_ids: ClassVar[bool] = False
    """Whether a request is known by the id that the column `events.request` holds."""
    draws_negatives: ClassVar[bool] = True
    """Whether `candidates` adds items of earlier events to the positives."""
    remark_words: ClassVar[Mapping[str, str]] = {}
    """What the report says of each count that `remarks` gives."""

    @abstractmethod
    def requests(self, tables: Tables, config: IngestConfig) -> ir.Table:
        """user_id, request_id, timestamp, and whatever `candidates` needs to know besides."""

    @abstractmethod
    def candidates(self, tables: Tables, asked: ir.Table, config: IngestConfig) -> ir.Table:
        """user_id, request_id, item_id and label_*: one row for each candidate of the requests `asked`.

        `asked` has the columns of `requests`, and history_end, split and the context_* of users and events.
        A column that a protocol adds to a table of events has a name of `TAKEN` (sections.py): another name
        might be that of a feature.
        """

    def check(self, name: str, config: IngestConfig) -> None:
        """Raises ValueError where the settings do not fit the protocol, which is called `name`."""
        if self.needs_split and config.split is None:
            raise ValueError(f"protocol {name} splits by time: give split.validation and split.test")
        asking = [feature.name for feature in config.features if feature.side == "candidate"]
        asking += [entry.name for entry in config.context_of("impressions").values()]
        if asking and not self.reads_impressions:
            raise ValueError(f'{asking[0]!r} comes from impressions: use protocol = "impressions"')

    def tasks(self, config: IngestConfig) -> tuple[str, ...]:
        """The names of the labels."""
        return (config.task,)

    def most_positives(self, config: IngestConfig) -> int:
        """The largest number of positives beside which a request draws negatives."""
        del config
        return int(self.draws_negatives)

    def without_requests(self, config: IngestConfig) -> str:
        """Why a log may have no requests at all, and what to do."""
        return f"no request has {config.requests.min_history} earlier events; lower requests.min_history"

    def dropped(self, engine: Engine, events: ir.Table, config: IngestConfig) -> dict[str, int]:
        """reason -> count of what only this protocol leaves out, from all events."""
        del engine, events, config
        return {}

    def remarks(self, engine: Engine, events: ir.Table, config: IngestConfig) -> dict[str, int]:
        """Counts of what is odd in the events of some users; `remark_words` has words for each."""
        del engine, events, config
        return {}


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
