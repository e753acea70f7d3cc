"""The section ids of the trainer's configuration: features whose ids come and go."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from embeddings.errors import ConfigError, hint_of
from embeddings.groups import TableName
from embeddings.ids.admission.table import ADMISSIONS
from embeddings.ids.eviction.table import EVICTIONS
from embeddings.ids.rules import IdRules, part_name
from trainer.config.sections import DataConfig, TrainConfig
from trainer.config.tables import GroupConfig, GroupName, PlanConfig, TableConfig
from trainer.config.toml import Settings

_DAY = 86_400
# The most rows for each cell of a sketch, so that each bucket has some sixteen cells.
_ROWS_A_CELL = 4


def _known(kinds: Collection[str], what: str) -> AfterValidator:
    def check(name: str) -> str:
        if name not in kinds:
            raise ValueError(f"no {what} is called that; they are {', '.join(kinds)}")
        return name

    return AfterValidator(check)


AdmissionName = Annotated[
    str, _known(ADMISSIONS, "admission"), Field(json_schema_extra={"enum": [*ADMISSIONS]})
]
EvictionName = Annotated[str, _known(EVICTIONS, "eviction"), Field(json_schema_extra={"enum": [*EVICTIONS]})]


class IdsConfig(Settings):
    """One feature whose ids get rows when they are seen and lose them again, see docs/online.md.

    Its ids in the log may be any 64-bit integers. All groups and sets share the map from ids to rows, so
    that an id has a row in all of the feature's tables, or in none; but see `groups`.
    """

    capacity: PositiveInt
    """The largest number of ids that have a row at a time. The tables have this number of rows, rounded
    down to whole buckets of 64 to 127 rows, and the shared ones."""
    shared_rows: PositiveInt = 64
    """The number of rows that all other ids share, by hash."""
    admission: AdmissionName = "all"
    """When an id gets a row: `all` at its first sighting, `count` after `admit_count` sightings, `chance`
    with probability `admit_chance` at each sighting."""
    admit_count: int = Field(2, ge=2, le=65_535)
    """The number of sightings that an id needs for `admission = "count"`."""
    counter: Literal["exact", "sketch"] = "exact"
    """How these are counted. `exact` keeps every id that waits. `sketch` keeps `sketch_cells` numbers
    whatever the number of ids: it forgets ids that were seen long ago, and lets a few ids in too early (see
    docs/online.md)."""
    sketch_cells: int = Field(1 << 20, ge=64)
    """The number of counters of a sketch, at least a fourth of `capacity`. Each takes 8 bytes."""
    admit_chance: float = Field(0.1, gt=0, le=1)
    """The probability of `admission = "chance"`."""
    counts: Literal["all", "candidates"] = "all"
    """Which sightings count: `candidates` leaves out behaviors, which a log repeats with every later request
    of their user. An id that only behaviors have then gets no row. For a feature that candidates do not have,
    it is the same as `all`."""
    eviction: EvictionName = "lru"
    """Which id of a full bucket gives its row to a new one: the one whose newest event is oldest (`lru`),
    that was seen least (`lfu`), that was seen least where sightings count half after every `half_life_days`
    (`lfu_decay`), or none (`never`)."""
    half_life_days: float = Field(7.0, gt=0, le=1e9)
    """The half-life of sightings for `lfu_decay`, in days of event time."""
    ttl_days: float = Field(0.0, ge=0, allow_inf_nan=False)
    """An id loses its row when its newest event is older than this number of days of event time. 0 means
    never."""
    protected_rows: int = Field(0, ge=0)
    """About this number of rows, those with the newest events, outlive `ttl_days`."""
    groups: dict[GroupName, PositiveInt] = Field(default_factory=dict)
    """For the name of a group, a smaller capacity of its tables. Of the ids that have a row in the other
    groups, so many have one there, too; the rest share rows. An id that loses its row loses both."""

    @model_validator(mode="after")
    def _check_together(self) -> IdsConfig:
        if self.protected_rows > self.capacity:
            raise ValueError("protected_rows is larger than capacity")
        if self.protected_rows and not self.ttl_days:
            raise ValueError("protected_rows protects from ttl_days, which is 0; set it, or leave this out")
        cells = -(-self.capacity // _ROWS_A_CELL)
        if self.admission == "count" and self.counter == "sketch" and self.sketch_cells < cells:
            raise ValueError(
                f"sketch_cells = {self.sketch_cells} are too few for capacity = {self.capacity}: they would "
                f"let nearly every id in; use {cells} or more"
            )
        least = IdRules(self.capacity).buckets
        for group, capacity in self.groups.items():
            if not least <= capacity <= self.capacity:
                raise ValueError(
                    f"groups.{group} = {capacity} must lie between {least}, a row for each bucket, and "
                    f"capacity = {self.capacity}"
                )
        return self

    def rules(self, feature: str, seed: int) -> dict[str, IdRules]:
        """The same as the id stage takes it: for the feature, and for each group with its own capacity."""
        given = self.model_dump(exclude={"half_life_days", "ttl_days", "groups"})
        half_life, ttl = (round(days * _DAY) for days in (self.half_life_days, self.ttl_days))
        whole = IdRules(**given, half_life=max(1, half_life), ttl=ttl, seed=seed)
        parts = {part_name(feature, name): whole.part(feature, rows) for name, rows in self.groups.items()}
        return {feature: whole, **parts}


FORK_WITH_IDS = (
    "phases.*.fork: branches begin at the same rows, and with ids.* each would give them to other ids; leave "
    "one of the two out"
)


def time_group_with_ids(feature: str) -> str:
    """Why targets cannot be grouped by a feature whose ids come and go."""
    return (
        f"ids.{feature}: model.time_group names it, and what the model learns of each of its rows would pass "
        f"from one id to the next that gets the row; leave ids.{feature} out, or group by another feature"
    )


def rules_of(ids: Mapping[str, IdsConfig], seed: int) -> dict[str, IdRules]:
    """Name of a map -> its rules, of all features; see `IdsConfig.rules`."""
    return {name: rules for key, each in ids.items() for name, rules in each.rules(key, seed).items()}


def against_ids(
    ids: Mapping[str, IdsConfig],
    groups: Mapping[str, GroupConfig],
    tables: Mapping[str, TableConfig],
    plan: PlanConfig,
    data: DataConfig,
    train: TrainConfig,
) -> Iterator[str]:
    """What features whose ids come and go cannot be had with, and what to do about it."""
    if ids and train.pipeline == "prefetch":
        yield (
            'train.pipeline = "prefetch" fills caches before rows of new ids begin anew (ids.*); use '
            '"sparse_dist" or "auto"'
        )
    for feature, settings in ids.items():
        if tables.get(feature, TableConfig()).rows is not None:
            yield f"tables.{feature}.rows: ids.{feature}.capacity says how many rows there are"
        if feature == data.domain:
            yield f"ids.{feature}: data.domain names it, and a domain's id must stay what it is"
        yield from _against_groups(feature, settings, groups)
        for table, rule in plan.tables.items():
            known = TableName.of(table)
            if known is None or known.feature != feature:
                continue
            if "data_parallel" in rule.sharding:
                yield _no_new_rows(f'plan.tables.{table}.sharding: "data_parallel" tables', feature)
            if "fused_uvm_caching" in rule.kernels:
                yield _no_new_rows(f'plan.tables.{table}.kernels: tables of "fused_uvm_caching"', feature)


def _against_groups(feature: str, ids: IdsConfig, groups: Mapping[str, GroupConfig]) -> Iterator[str]:
    for name in ids.groups:
        if name not in groups:
            yield f"ids.{feature}.groups.{name}: there is no such group"
        elif feature not in (groups[name].features or (feature,)):
            yield f"ids.{feature}.groups.{name}: that group has no table of {feature}; leave it out"
    for name, group in groups.items():
        if "data_parallel" in group.sharding and feature in (group.features or (feature,)):
            yield _no_new_rows(f'groups.{name}.sharding: "data_parallel" tables', feature)


def check_features(
    ids: Mapping[str, IdsConfig], raw: Mapping[str, bool], groups: Mapping[str, GroupConfig]
) -> None:
    """Raise ConfigError where the log lacks such a feature, or has raw ids of one that is none.

    Args:
        raw: feature of the log -> whether its ids are raw.
    """
    for name in ids:
        if name not in raw:
            there = hint_of(name, list(raw), f"it has {', '.join(raw)}")
            raise ConfigError(f"ids.{name}: the log has no such feature; {there}")
    for name, any_number in raw.items():
        used = any(name in (group.features or (name,)) for group in groups.values())
        if any_number and used and name not in ids:
            raise ConfigError(
                f"the log's ids of {name!r} are raw 64-bit numbers, for which no table is large enough: add "
                f"[ids.{name}] with a capacity"
            )


def check_kernels(ids: Collection[str], kernels: Mapping[str, str]) -> None:
    """Raise ConfigError where a table of such a feature got a kernel that hides its rows.

    Args:
        ids: features; kernels: name of a table -> its kernel by the plan.
    """
    for table, kernel in kernels.items():
        name = TableName.of(table)
        if name is not None and name.feature in ids and kernel not in ("fused", "fused_uvm"):
            problem = _no_new_rows(f'table {table}: those of kernel "{kernel}"', name.feature)
            raise ConfigError(f'{problem}: set plan.tables.{table}.kernels = ["fused"], or "fused_uvm"')


def _no_new_rows(what: str, feature: str) -> str:
    return f"{what} cannot give rows to new ids, and ids.{feature} wants that; use another one"
