"""The sections of the ingest settings, one class each; `pipelines.ingest.config` puts them together."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    ByteSize,
    Field,
    StringConstraints,
    TypeAdapter,
    field_validator,
    model_validator,
)

from pipelines.ingest.exposure_config import ExposureConfig
from trainer.config.mistakes import NAME
from trainer.config.places import PlaceText
from trainer.config.toml import Settings
from trainer.log.encoders.table import AnyEncoder
from trainer.log.schema import Side
from trainer.ranks.machine import memory_bytes

Name = Annotated[str, StringConstraints(pattern=NAME)]
Unit = Literal["s", "ms", "us", "ns"]
IdKind = Literal["dense", "raw", "hashed"]
# Names that the log, or a table on the way to it, uses for something else: no feature may have one. A column
# that a protocol adds to a table of events has a name of these, or would replace a feature of that name.
TAKEN = {"user_id", "item_id", "request_id", "timestamp", "split", "history_end", "candidates"}
TAKEN |= {"place", "bucket", "row_key", "draw", "wanted", "count", "last", "weight", "size", "position"}
TAKEN |= {"distance", "seconds", "num_candidates", "end"}


class ColumnConfig(Settings):
    """An id column of a raw table."""

    kind: ClassVar[str] = "column"
    name: Name
    """The name in the log."""
    column: str = ""
    """The column in the table; empty: `name`."""
    multi: bool = False
    """Whether the column holds lists, or text that `separator` splits."""
    separator: str = ""
    """The sign between the values of a cell of text; empty: the column holds lists."""
    ids: IdKind = "dense"
    """What ids are: `dense`, numbers from 1 on that stand for the values of a vocabulary; `raw`, the integers
    of the column themselves; `hashed`, 64-bit hashes of its text. Neither `raw` nor `hashed` needs a
    vocabulary, so that a new value needs no new log; a model needs `[ids.<feature>]` for them."""
    encoder: AnyEncoder | None = None
    """For a column of numbers whose order matters: how they become ids, see docs/encoders.md. `kind` is
    `mnse` (digits in several bases), `buckets` (intervals) or `number` (the number itself, which only
    candidates may have). Not set means that the column holds ids."""

    @property
    def source(self) -> str:
        """The column of the raw table."""
        return self.column or self.name

    @model_validator(mode="after")
    def _separator_splits(self) -> Self:
        if self.separator and not self.multi:
            raise ValueError(f"{self.kind} {self.name}: separator needs multi = true")
        return self

    @model_validator(mode="after")
    def _numbers_are_no_ids(self) -> Self:
        if self.encoder is not None and (self.multi or self.ids != "dense"):
            problem = "an encoder is for one number a row; leave multi and ids out"
            raise ValueError(f"{self.kind} {self.name}: {problem}")
        return self


class FeatureConfig(ColumnConfig):
    """A further id column."""

    kind: ClassVar[str] = "feature"
    side: Side = "both"
    """`both`: it is an attribute of the item, so that candidates have it too (from the impressions table
    where that has the column, else as of the item's last event before the request; where the item table has
    it, both have it from there); `history`: it belongs to the event alone; `candidate`: to the impression
    alone."""

    @model_validator(mode="after")
    def _raw_numbers_are_of_candidates(self) -> Self:
        raw = self.encoder is not None and not self.encoder.gives_ids
        if raw and self.side != "candidate":
            raise ValueError(
                f'feature {self.name}: encoder "number" gives the head a number of each candidate, and '
                'behaviors have no such input; set side = "candidate", or take "mnse" or "buckets"'
            )
        return self


class ContextConfig(ColumnConfig):
    """A request's own id column."""

    kind: ClassVar[str] = "context"
    table: Literal["impressions", "events", "users"] = "impressions"
    """`impressions`; or `events`: the column says something about the user, and is taken from the newest
    event strictly before the request; or `users`: the user table."""

    @model_validator(mode="after")
    def _has_ids(self) -> Self:
        if self.encoder is not None and not self.encoder.gives_ids:
            raise ValueError(
                f'context {self.name}: encoder "number" is for candidates alone, since requests have no '
                'numbers; take "mnse" or "buckets"'
            )
        return self


class RoleColumns(Settings):
    """Which columns of a table say who did what, and when."""

    user: str = "user_id"
    """The column of the user's id."""
    item: str = "item_id"
    """The column of the item's id, the feature `item_id` of the log."""
    timestamp: str = "timestamp"
    """The column of the time."""
    timestamp_unit: Unit = "s"
    """The unit of times that are numbers; a part of a second is cut off."""
    request: str = ""
    """The column of the request's id; empty: a user's rows of one second are one request."""


class EventsConfig(RoleColumns):
    """Which columns of the event table hold what; `taxonomy` goes from coarse to fine.

    Without a `request` column, a user's events of one second are one request, and its id is that second.
    """

    taxonomy: tuple[Name, ...] = ()
    """The columns of the item's categories, from coarse to fine; `category` becomes the feature
    `category_id`."""
    item_ids: IdKind = "dense"
    """What the ids of `item_id` are, see `features.ids`."""
    taxonomy_ids: IdKind = "dense"
    """What the ids of all levels of the taxonomy are, see `features.ids`."""

    @property
    def levels(self) -> dict[str, str]:
        """Feature name in the log -> column of the event table, of the taxonomy."""
        return {name if name.endswith("_id") else f"{name}_id": name for name in self.taxonomy}

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        roles = (self.user, self.item, self.timestamp, self.request)
        if len(set(roles)) < len(roles):
            raise ValueError(f"user, item, timestamp and request must be four columns, not {roles}")
        names = [name if name.endswith("_id") else f"{name}_id" for name in self.taxonomy]
        clash = sorted(TAKEN.intersection(names) | {name for name in names if names.count(name) > 1})
        if clash:
            raise ValueError(f"taxonomy gives the feature name {clash[0]!r} twice; rename that column")
        return self


class LabelConfig(Settings):
    """A task's label column; `click = "c"` is short for `click = { column = "c" }`."""

    column: str
    """The column of the impressions table."""
    kind: Literal["binary", "probability"] = "binary"
    """`binary`: 0 or 1 (or false and true); `probability`: anything from 0 to 1."""
    positive_from: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """For a column of other numbers (ratings, say): the label is 1 from this number on."""
    partial: bool = False
    """Whether the label was observed in a part of the rows only: it is null, or NaN, in the others. Without
    this, such a row is refused."""
    weight: str = ""
    """The column of this label's weight in the loss, at least 0, beside the candidate's own; it may be null
    where the label is. Empty: all have 1."""

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if self.positive_from is not None and self.kind == "probability":
            raise ValueError("positive_from makes a label binary: leave kind out")
        return self


Label = Annotated[
    LabelConfig, BeforeValidator(lambda given: {"column": given} if isinstance(given, str) else given)
]


class ImpressionsConfig(RoleColumns):
    """Which columns of the impressions table hold what: one row is one candidate of one request."""

    labels: dict[Name, Label] = Field(
        default_factory=lambda: {"click": LabelConfig(column="click")}, min_length=1
    )
    """For each task, its column of numbers or booleans, 0 or 1 unless declared otherwise."""
    weight: str = ""
    """The column of each candidate's weight in the loss, at least 0; empty: all have 1."""
    numeric: tuple[Name, ...] = ()
    """The columns of numbers that candidates have."""
    domain: str = ""
    """With [[domains]], the domain whose items are shown."""
    exposure: ExposureConfig | None = None


class DomainConfig(Settings):
    """One source of a cross-domain history: its own files, columns, item ids and categories."""

    name: Name
    """The name of the source."""
    files: tuple[PlaceText, ...] = Field(min_length=1)
    """Paths or patterns, as for `--events`, from the current folder."""
    user: str = "user_id"
    """The column of the user's id."""
    item: str = "item_id"
    """The column of the item's id, the feature `item_id` of the log."""
    timestamp: str = "timestamp"
    """The column of the time."""
    timestamp_unit: Unit = "s"
    """The unit of times that are numbers; a part of a second is cut off."""
    scenario: str = ""
    """The column of text or integers that says where it happened; empty if the source has none."""
    action: str = ""
    """The column of text or integers that says what was done; empty if the source has none."""
    key: str = ""
    """The column that `mapping`, a table of this column and the levels of `events.taxonomy`, explains. A
    level that the mapping does not have is unknown, never guessed."""
    mapping: str = ""
    """The file of that table, from the current folder."""

    @model_validator(mode="after")
    def _mapping_has_a_key(self) -> Self:
        if bool(self.key) != bool(self.mapping):
            raise ValueError(f"domain {self.name}: give key and mapping together")
        return self


class ItemTableConfig(Settings):
    """A table with one row an item, if there is one: its features of items are taken for constant."""

    files: tuple[PlaceText, ...] = ()
    """Paths or patterns, as for `--events`, from the current folder."""
    item: str = "item_id"
    """The column with the item."""


class UserTableConfig(Settings):
    """A table with one row a user, if there is one, for `[[context]]` with `table = "users"`."""

    files: tuple[PlaceText, ...] = ()
    """Paths or patterns, as for `--events`, from the current folder."""
    user: str = "user_id"
    """The column with the user."""


class CsvConfig(Settings):
    """How tables of text are written."""

    delimiter: str = ""
    """The sign between two cells; empty: a comma, tab, semicolon or bar, as the header of each file says."""
    nulls: tuple[str, ...] = ()
    """Words that mean no value, as an empty cell does."""

    @field_validator("delimiter")
    @classmethod
    def _is_one_sign(cls, value: str) -> str:
        if len(value) > 1 or value in ('"', "\r", "\n"):
            raise ValueError("is one sign, no quote or line end; write the files anew, with tabs for example")
        return value


class RequestsConfig(Settings):
    """Which requests are asked and how many candidates they get; `next-basket` uses `positives` a basket."""

    positives: int = Field(default=6, ge=1)
    """The candidates that a basket gives at most (`next-basket`)."""
    negatives: int = Field(default=4, ge=1)
    """The candidates drawn beside each positive."""
    min_history: int = Field(default=50, ge=0)
    """The earlier events that a request needs, whatever the protocol."""
    per_user: int = Field(default=0, ge=0)
    """The requests that a user keeps in one split, drawn by chance; 0 = all."""
    exclude: Literal["user", "request"] = "user"
    """`user`: negatives are no item that the user ever has; `request`: no item of the request
    (`time-split`)."""
    min_events: int = Field(default=210, ge=3)
    """The events that a user needs (`leave-last`)."""
    distances: tuple[Annotated[int, Field(ge=3)], ...] = tuple(range(3, 94, 5))
    """The distances of the training targets from the user's last event, which has distance 1
    (`leave-last`)."""
    new_items: Literal["keep", "drop"] = "keep"
    """Whether a positive whose item no earlier event has is asked (`keep`) or not (`drop`). Negatives are
    items of earlier events, so that no negative is ever new. `impressions` refuses
    `drop`: its candidates are kept as shown."""
    popularity_days: int = Field(default=0, ge=0)
    """Negatives are drawn by how often items occur in so many days before the request; 0 = in all the time
    before it."""

    @model_validator(mode="after")
    def _distances_are_distinct(self) -> Self:
        if len(set(self.distances)) < len(self.distances):
            raise ValueError("distances names one distance twice; leave each once")
        return self


class SplitConfig(Settings):
    """Where the splits by time begin."""

    validation: date
    """The first day (UTC) of the validation split, such as 2025-03-16; training ends before it."""
    test: date
    """The first day (UTC) of the test split."""

    @model_validator(mode="after")
    def _validation_comes_first(self) -> Self:
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


def _midnight(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp())


class VocabularyConfig(Settings):
    """Where the ids come from: counted anew, or those of the older log `log`, whose values keep them."""

    log: PlaceText = ""
    """A sequence log's folder; empty: count anew."""
    extend: bool = False
    """Whether values that `log` does not know get new ids after its own; otherwise they are unknown."""

    @model_validator(mode="after")
    def _extends_something(self) -> Self:
        if self.extend and not self.log:
            raise ValueError("extend needs an older log: give vocabulary.log, or --vocabulary LOG")
        return self


class FilesConfig(Settings):
    """The layout of the Parquet files."""

    rows_per_group: int = Field(default=64, ge=1)
    """The rows of a row group, which is decoded whole."""
    rows_per_file: int = Field(default=1024, ge=1)
    """The rows of a file, a multiple of `rows_per_group`."""
    layout: Literal["user", "request"] = "user"
    """A row is a `user` with all requests, or one `request` with the history as of it."""
    max_history: int = Field(default=0, ge=0)
    """The newest behaviors that a request row keeps; 0 = all."""
    order: Literal["shuffle", "time"] = "shuffle"
    """The order of the rows: a seeded `shuffle`, or by request `time` (request rows only)."""

    @model_validator(mode="after")
    def _choices_fit(self) -> Self:
        if self.rows_per_file % self.rows_per_group:
            sizes = f"rows_per_file ({self.rows_per_file}) and rows_per_group ({self.rows_per_group})"
            raise ValueError(f"{sizes}: the first must be a multiple of the second")
        if self.layout == "user" and (self.max_history or self.order == "time"):
            raise ValueError('max_history and order = "time" need layout = "request"')
        return self


class EngineConfig(Settings):
    """What the query engine may use. None of it changes the log."""

    threads: int = Field(default=0, ge=0)
    """The threads that it uses; 0 = every core."""
    memory_limit: str = Field(default="4GB", pattern=r"^[1-9][0-9]*(MB|GB|TB|MiB|GiB|TiB)$")
    """The memory of the whole process with DuckDB; of the driver's heap with Spark. No more than the machine,
    or the container, has."""
    buckets: int = Field(default=0, ge=0, le=4096)
    """Buckets of users that are put together one after the other; 0 = as memory_limit asks."""

    @property
    def memory_bytes(self) -> int:
        """`memory_limit` as a number, but no more than this process may take at all."""
        # The manifest keeps the setting as it was written, so the setting itself stays text.
        return min(TypeAdapter(ByteSize).validate_python(self.memory_limit), memory_bytes())


class ReportConfig(Settings):
    """What an ingest measures besides. None of it changes the rows of the log."""

    history_free: bool = True
    """Whether to measure how well candidates tell their label without any history, see docs/ingest.md."""
