"""The settings of `tandemrec ingest`: one TOML file and `--set section.key=value` overrides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticKnownError

from pipelines.ingest.exposure_config import ExposureConfig
from pipelines.ingest.protocols.protocol import RequestProtocol
from pipelines.ingest.protocols.table import PROTOCOLS
from pipelines.ingest.sections import (
    TAKEN,
    ContextConfig,
    CsvConfig,
    DomainConfig,
    EngineConfig,
    EventsConfig,
    FeatureConfig,
    FilesConfig,
    ImpressionsConfig,
    ItemTableConfig,
    LabelConfig,
    Name,
    ReportConfig,
    RequestsConfig,
    SplitConfig,
    UserTableConfig,
    VocabularyConfig,
)
from trainer.config.toml import Settings, load_settings

DOMAIN_FEATURES = ("domain_id", "scenario_id", "action_id")


def _known_protocol(given: Any) -> Any:
    if isinstance(given, str) and given in PROTOCOLS:
        return given
    *others, last = (repr(name) for name in PROTOCOLS)
    raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})


class IngestConfig(Settings):
    """How raw events become a sequence log."""

    protocol: Annotated[str, BeforeValidator(_known_protocol)] = Field(
        default="next-basket", json_schema_extra={"enum": list[Any](PROTOCOLS)}
    )
    """How requests are made of events, see docs/ingest.md."""
    task: Name = "purchase"
    """The label's name where the protocol makes it."""
    seed: int = Field(default=7, ge=0)
    """The seed of every random draw."""
    users: int = Field(default=0, ge=0)
    """Keep the requests of that many users, for trial runs; 0 = all."""
    events: EventsConfig = EventsConfig()
    features: tuple[FeatureConfig, ...] = ()
    context: tuple[ContextConfig, ...] = ()
    impressions: ImpressionsConfig = ImpressionsConfig()
    item_table: ItemTableConfig = ItemTableConfig()
    user_table: UserTableConfig = UserTableConfig()
    domains: tuple[DomainConfig, ...] = ()
    text_columns: tuple[str, ...] = ()
    """Columns that are text even where they hold integers, or do in some files."""
    partition_columns: tuple[str, ...] = ()
    """Columns that `name=value` folders of the files' paths hold, not the files."""
    csv: CsvConfig = CsvConfig()
    requests: RequestsConfig = RequestsConfig()
    split: SplitConfig | None = None
    vocabulary: VocabularyConfig = VocabularyConfig()
    files: FilesConfig = FilesConfig()
    engine: EngineConfig = EngineConfig()
    report: ReportConfig = ReportConfig()

    @property
    def request_protocol(self) -> RequestProtocol:
        """What the name `protocol` stands for."""
        return PROTOCOLS[self.protocol]

    @property
    def all_features(self) -> tuple[FeatureConfig, ...]:
        """Every feature of the log: item, taxonomy, those of domains, then [[features]] but raw numbers."""
        own = [FeatureConfig(name="item_id", column=self.events.item, ids=self.events.item_ids)]
        own += [
            FeatureConfig(name=name, column=column, ids=self.events.taxonomy_ids)
            for name, column in self.events.levels.items()
        ]
        if self.domains:
            domain, *others = DOMAIN_FEATURES
            own += [FeatureConfig(name=domain)]
            own += [FeatureConfig(name=name, side="history") for name in others]
        raw = {entry.name for entry in self.features if entry.encoder and not entry.encoder.gives_ids}
        return (*own, *(entry for entry in self.features if entry.name not in raw))

    @property
    def numbers(self) -> dict[str, str]:
        """Number of candidates -> its column of the impressions table."""
        found = {name: name for name in self.impressions.numeric}
        raw = (entry for entry in self.features if entry.encoder and not entry.encoder.gives_ids)
        return found | {entry.name: entry.source for entry in raw}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The label columns of the log."""
        return self.request_protocol.tasks(self)

    @property
    def labels(self) -> dict[str, LabelConfig]:
        """What the impressions say of each label; a label that a protocol makes is always observed."""
        return dict(self.impressions.labels) if self.request_protocol.reads_impressions else {}

    @property
    def label_weights(self) -> tuple[str, ...]:
        """The labels with a weight of their own in the log: given, or made of repeated exposures."""
        return tuple(task for task, label in self.labels.items() if label.weight or self.exposure)

    @property
    def exposure(self) -> ExposureConfig | None:
        """What repeated exposures weigh; None: nothing is made of them."""
        return self.impressions.exposure if self.request_protocol.reads_impressions else None

    def context_of(self, table: Literal["events", "impressions", "users"]) -> dict[str, ContextConfig]:
        """context_* -> the context that comes from a table."""
        return {f"context_{entry.name}": entry for entry in self.context if entry.table == table}

    @model_validator(mode="after")
    def _side_tables_are_used(self) -> Self:
        if self.item_table.files and self.domains:
            raise ValueError("item_table: with [[domains]] their mapping tables say what items are")
        if bool(self.user_table.files) != bool(self.context_of("users")):
            raise ValueError('user_table.files and a [[context]] with table = "users" need each other')
        return self

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        names = Counter(feature.name for feature in self.all_features)
        names.update(TAKEN - {"item_id"})
        names.update(f"context_{entry.name}" for entry in self.context)
        names.update(f"label_{task}" for task in self.tasks)
        names.update(f"weight_{task}" for task in self.label_weights)
        names.update(f"numeric_{name}" for name in self.impressions.numeric)
        names.update(f"numeric_{name}" for name in self.numbers if name not in self.impressions.numeric)
        for entry in (*self.all_features, *self.context):
            parts = {} if entry.encoder is None else entry.encoder.parts(entry.name)
            names.update(part for part in parts if part != entry.name)
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
    def _protocol_has_what_it_needs(self) -> Self:
        self.request_protocol.check(self.protocol, self)
        return self


def load_ingest_config(path: Path, overrides: Sequence[str] = ()) -> IngestConfig:
    """Reads a TOML file and applies overrides; see `trainer.config.toml.load_settings` for the errors."""
    return load_settings(IngestConfig, path, overrides)
