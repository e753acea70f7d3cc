"""The settings of `tandemrec ingest`: one TOML file and `--set section.key=value` overrides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from pipelines.ingest.sections import (
    CsvConfig,
    EngineConfig,
    FilesConfig,
    ItemTableConfig,
    Label,
    LabelConfig,
    UserTableConfig,
    VocabularyConfig,
)
from trainer.config.toml import Settings, load_settings

Name = Annotated[str, StringConstraints(pattern="^[a-z][a-z0-9_]*$")]
Unit = Literal["s", "ms", "us", "ns"]
Protocol = Literal["next-basket", "impressions", "leave-last", "time-split"]
DOMAIN_FEATURES = ("domain_id", "scenario_id", "action_id")
# Names that the log, or a table on the way to it, uses for something else.
_TAKEN = {"user_id", "item_id", "request_id", "timestamp", "split", "history_end", "candidates"}
_TAKEN |= {"place", "bucket", "row_key", "draw", "wanted", "count", "last", "weight", "size", "position"}
_TAKEN |= {"distance", "seconds", "num_candidates", "end"}


class ColumnConfig(Settings):
    """An id column of a raw table: a list column where `multi`, or text cut at `separator`.

    Attributes:
        name: in the log; column: in the table, `name` if empty.
        multi: the column holds lists, or text that `separator` splits.
        separator: between the values of a cell of text; empty: the column holds lists.
    """

    kind: ClassVar[str] = "column"
    name: Name
    column: str = ""
    multi: bool = False
    separator: str = ""

    @property
    def source(self) -> str:
        """The column of the raw table."""
        return self.column or self.name

    @model_validator(mode="after")
    def _separator_splits(self) -> Self:
        if self.separator and not self.multi:
            raise ValueError(f"{self.kind} {self.name}: separator needs multi = true")
        return self


class FeatureConfig(ColumnConfig):
    """A further id column.

    Attributes:
        side: `both`: an attribute of the item, so that candidates have it too (from the impressions table
            where that has the column, else as of the item's last event before the request; where the item
            table has it, both have it from there); `history`: of the event alone; `candidate`: of the
            impression alone.
    """

    kind: ClassVar[str] = "feature"
    side: Literal["both", "history", "candidate"] = "both"


class ContextConfig(ColumnConfig):
    """A request's own id column.

    Attributes:
        table: `impressions`; or `events`: a column that says something about the user, taken from the newest
            event strictly before the request; or `users`, the user table.
    """

    kind: ClassVar[str] = "context"
    table: Literal["impressions", "events", "users"] = "impressions"


class EventsConfig(Settings):
    """Which columns of the event table hold what; `taxonomy` goes from coarse to fine.

    Without a `request` column, a user's events of one second are one request, and its id is that second.

    Attributes:
        user: column of the user's id.
        item: column of the item's id, the feature `item_id` of the log.
        timestamp: column of the time.
        timestamp_unit: of times that are numbers; a part of a second is cut off.
        request: column of the request's id, or empty.
        taxonomy: columns of the item's categories, from coarse to fine; `category` becomes the
            feature `category_id`.
    """

    user: str = "user_id"
    item: str = "item_id"
    timestamp: str = "timestamp"
    timestamp_unit: Unit = "s"
    request: str = ""
    taxonomy: tuple[Name, ...] = ()

    @property
    def features(self) -> dict[str, str]:
        """Feature name in the log -> column of the event table, the item first."""
        taxonomy = {name if name.endswith("_id") else f"{name}_id": name for name in self.taxonomy}
        return {"item_id": self.item, **taxonomy}

    @model_validator(mode="after")
    def _names_are_distinct(self) -> EventsConfig:
        roles = (self.user, self.item, self.timestamp, self.request)
        if len(set(roles)) < len(roles):
            raise ValueError(f"user, item, timestamp and request must be four columns, not {roles}")
        names = [name if name.endswith("_id") else f"{name}_id" for name in self.taxonomy]
        clash = sorted(_TAKEN.intersection(names) | {name for name in names if names.count(name) > 1})
        if clash:
            raise ValueError(f"taxonomy gives the feature name {clash[0]!r} twice; rename that column")
        return self


class ImpressionsConfig(Settings):
    """Which columns of the impressions table hold what: one row is one candidate of one request.

    Attributes:
        user: column of the user's id.
        item: column of the item's id, the feature `item_id` of the log.
        timestamp: column of the time.
        timestamp_unit: of times that are numbers; a part of a second is cut off.
        request: request id; without it a user's rows of one second are one request.
        labels: task -> column of numbers or booleans, 0 or 1 unless declared otherwise.
        weight: column of each candidate's weight in the loss, at least 0; empty: all have 1.
        numeric: columns of numbers that candidates have.
        domain: with [[domains]], the domain whose items are shown.
    """

    user: str = "user_id"
    item: str = "item_id"
    timestamp: str = "timestamp"
    timestamp_unit: Unit = "s"
    request: str = ""
    labels: dict[Name, Label] = Field(
        default_factory=lambda: {"click": LabelConfig(column="click")}, min_length=1
    )
    weight: str = ""
    numeric: tuple[Name, ...] = ()
    domain: str = ""


class DomainConfig(Settings):
    """One source of a cross-domain history: its own files, columns, item ids and categories.

    Attributes:
        name: of the source; files: paths or patterns, as for `--events`, from the current folder.
        user: column of the user's id.
        item: column of the item's id, the feature `item_id` of the log.
        timestamp: column of the time.
        timestamp_unit: of times that are numbers; a part of a second is cut off.
        scenario: column of text or integers with where it happened; empty if the source has none.
        action: column of text or integers with what was done; empty if the source has none.
        key: the column that `mapping`, a table of this column and the levels of `events.taxonomy`, explains.
            A level that the mapping does not have is unknown, never guessed.
        mapping: the file of that table, from the current folder.
    """

    name: Name
    files: tuple[str, ...] = Field(min_length=1)
    user: str = "user_id"
    item: str = "item_id"
    timestamp: str = "timestamp"
    timestamp_unit: Unit = "s"
    scenario: str = ""
    action: str = ""
    key: str = ""
    mapping: str = ""

    @model_validator(mode="after")
    def _mapping_has_a_key(self) -> DomainConfig:
        if bool(self.key) != bool(self.mapping):
            raise ValueError(f"domain {self.name}: give key and mapping together")
        return self


class RequestsConfig(Settings):
    """Which requests are asked and how many candidates they get; `next-basket` uses `positives` a basket.

    Attributes:
        positives: candidates that a basket gives; negatives: candidates drawn beside each.
        min_history: earlier events that a request needs.
        per_user: requests that a user keeps in one split, drawn by chance; 0 = all (`time-split`).
        exclude: negatives are no item of the whole `user`, or only not of the `request` (`time-split`).
        min_events: events a user needs (`leave-last`).
        distances: of the training targets from the user's last event, which has distance 1 (`leave-last`).
        new_items: whether a positive whose item no earlier event has is asked (`keep`) or not (`drop`).
            Negatives are items of earlier events, so that no negative is ever new.
    """

    positives: int = Field(default=6, ge=1)
    negatives: int = Field(default=4, ge=1)
    min_history: int = Field(default=50, ge=0)
    per_user: int = Field(default=0, ge=0)
    exclude: Literal["user", "request"] = "user"
    min_events: int = Field(default=210, ge=3)
    distances: tuple[Annotated[int, Field(ge=3)], ...] = tuple(range(3, 94, 5))
    new_items: Literal["keep", "drop"] = "keep"

    @model_validator(mode="after")
    def _distances_are_distinct(self) -> RequestsConfig:
        if len(set(self.distances)) < len(self.distances):
            raise ValueError("distances names one distance twice; leave each once")
        return self


class SplitConfig(Settings):
    """Where the splits by time begin.

    Attributes:
        validation: first day (UTC) of the validation split, such as 2025-03-16; training ends before it.
        test: first day (UTC) of the test split.
    """

    validation: date
    test: date

    @model_validator(mode="after")
    def _validation_comes_first(self) -> SplitConfig:
        if self.validation >= self.test:
            raise ValueError(f"validation ({self.validation}) must begin before test ({self.test})")
        return self

    @property
    def validation_start(self) -> int:
        """Unix second at which validation begins and training ends."""
        return _midnight(self.validation)

    @property
    def test_start(self) -> int:
        """Unix second at which the test split begins."""
        return _midnight(self.test)


class IngestConfig(Settings):
    """How raw events become a sequence log.

    Attributes:
        protocol: how requests are made of events, see docs/ingest.md.
        task: the label's name where the protocol makes it.
        seed: of every random draw.
        users: keep the requests of that many users, for trial runs; 0 = all.
        text_columns: columns that are text even where they hold integers, or do in some files.
        partition_columns: columns that `name=value` folders of the files' paths hold, not the files.
    """

    protocol: Protocol = "next-basket"
    task: Name = "purchase"
    seed: int = Field(default=7, ge=0)
    users: int = Field(default=0, ge=0)
    events: EventsConfig = EventsConfig()
    features: tuple[FeatureConfig, ...] = ()
    context: tuple[ContextConfig, ...] = ()
    impressions: ImpressionsConfig = ImpressionsConfig()
    item_table: ItemTableConfig = ItemTableConfig()
    user_table: UserTableConfig = UserTableConfig()
    domains: tuple[DomainConfig, ...] = ()
    text_columns: tuple[str, ...] = ()
    partition_columns: tuple[str, ...] = ()
    csv: CsvConfig = CsvConfig()
    requests: RequestsConfig = RequestsConfig()
    split: SplitConfig | None = None
    vocabulary: VocabularyConfig = VocabularyConfig()
    files: FilesConfig = FilesConfig()
    engine: EngineConfig = EngineConfig()

    @property
    def all_features(self) -> tuple[FeatureConfig, ...]:
        """Every feature of the log: item, taxonomy, those of domains, then [[features]]."""
        own = [FeatureConfig(name=name, column=column) for name, column in self.events.features.items()]
        if self.domains:
            domain, *others = DOMAIN_FEATURES
            own += [FeatureConfig(name=domain)]
            own += [FeatureConfig(name=name, side="history") for name in others]
        return (*own, *self.features)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The label columns of the log."""
        return tuple(self.impressions.labels) if self.protocol == "impressions" else (self.task,)

    @property
    def event_context(self) -> tuple[ContextConfig, ...]:
        """The context that comes from the events."""
        return tuple(entry for entry in self.context if entry.table == "events")

    @property
    def shown_context(self) -> tuple[ContextConfig, ...]:
        """The context that comes from the impressions."""
        return tuple(entry for entry in self.context if entry.table == "impressions")

    @property
    def user_context(self) -> tuple[ContextConfig, ...]:
        """The context that comes from the user table."""
        return tuple(entry for entry in self.context if entry.table == "users")

    @model_validator(mode="after")
    def _side_tables_are_used(self) -> IngestConfig:
        if self.item_table.files and self.domains:
            raise ValueError("item_table: with [[domains]] their mapping tables say what items are")
        if bool(self.user_table.files) != bool(self.user_context):
            raise ValueError('user_table.files and a [[context]] with table = "users" need each other')
        return self

    @model_validator(mode="after")
    def _names_are_distinct(self) -> IngestConfig:
        names = Counter(feature.name for feature in self.all_features)
        names.update(_TAKEN - {"item_id"})
        names.update(f"context_{entry.name}" for entry in self.context)
        names.update(f"label_{task}" for task in self.tasks)
        names.update(f"numeric_{name}" for name in self.impressions.numeric)
        clash = [name for name, times in names.items() if times > 1]
        if clash:
            raise ValueError(
                f"features, context, labels or numbers give the name {clash[0]!r} twice; rename one"
            )
        domains = [domain.name for domain in self.domains]
        if len(set(domains)) < len(domains):
            raise ValueError("domains: two have one name; rename one")
        return self

    @model_validator(mode="after")
    def _protocol_has_what_it_needs(self) -> IngestConfig:
        if self.protocol != "leave-last" and self.split is None:
            raise ValueError(f"protocol {self.protocol} splits by time: give split.validation and split.test")
        if self.protocol == "impressions":
            if self.domains and self.impressions.domain not in {domain.name for domain in self.domains}:
                raise ValueError(
                    "impressions.domain must name one of the domains: it says whose items are shown"
                )
            if self.requests.new_items == "drop":
                raise ValueError(
                    "requests.new_items is about drawn candidates: impressions are kept as shown"
                )
            return self
        asking = [feature.name for feature in self.features if feature.side == "candidate"]
        asking += [entry.name for entry in self.shown_context]
        if asking:
            raise ValueError(f'{asking[0]!r} comes from impressions: use protocol = "impressions"')
        return self


def load_ingest_config(path: Path, overrides: Sequence[str] = ()) -> IngestConfig:
    """Reads a TOML file and applies overrides; see `trainer.config.toml.load_settings` for the errors."""
    return load_settings(IngestConfig, path, overrides)


def _midnight(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp())
