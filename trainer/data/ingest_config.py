"""The settings of `tandemrec ingest`: one TOML file and `--set section.key=value` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from trainer.settings import Settings, load_settings

Name = Annotated[str, StringConstraints(pattern="^[a-z][a-z0-9_]*$")]
_TAKEN = {"user_id", "item_id", "request_id"}


class EventsConfig(Settings):
    """Which columns of the event table hold what; `taxonomy` goes from coarse to fine.

    Without a `request` column, a user's events of one second are one request, and its id is that second.
    """

    user: str = "user_id"
    item: str = "item_id"
    timestamp: str = "timestamp"
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


class RequestsConfig(Settings):
    """How many candidates a request gets, and how many earlier events it needs."""

    positives: int = Field(default=6, ge=1)
    negatives: int = Field(default=4, ge=1)
    min_history: int = Field(default=50, ge=1)


class SplitConfig(Settings):
    """First day (UTC) of the validation and of the test split."""

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


class FilesConfig(Settings):
    """The layout of the Parquet files."""

    rows_per_group: int = Field(default=64, ge=1)
    rows_per_file: int = Field(default=1024, ge=1)

    @model_validator(mode="after")
    def _files_hold_whole_groups(self) -> FilesConfig:
        if self.rows_per_file % self.rows_per_group:
            sizes = f"rows_per_file ({self.rows_per_file}) and rows_per_group ({self.rows_per_group})"
            raise ValueError(f"{sizes}: the first must be a multiple of the second")
        return self


class EngineConfig(Settings):
    """What the query engine may use. None of it changes the log; threads = 0 means every core."""

    threads: int = Field(default=0, ge=0)
    memory_limit: str = Field(default="4GB", pattern=r"^[1-9][0-9]*(MB|GB|TB|MiB|GiB|TiB)$")


class IngestConfig(Settings):
    """How raw events become a sequence log. `users` > 0 keeps that many users, for trial runs."""

    protocol: Literal["next-basket"] = "next-basket"
    task: Name = "purchase"
    seed: int = Field(default=7, ge=0)
    users: int = Field(default=0, ge=0)
    events: EventsConfig = EventsConfig()
    requests: RequestsConfig = RequestsConfig()
    split: SplitConfig
    files: FilesConfig = FilesConfig()
    engine: EngineConfig = EngineConfig()


def load_ingest_config(path: Path, overrides: Sequence[str] = ()) -> IngestConfig:
    """Reads a TOML file and applies overrides; see `trainer.settings.load_settings` for the errors."""
    return load_settings(IngestConfig, path, overrides)


def _midnight(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp())
