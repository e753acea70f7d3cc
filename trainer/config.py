"""The trainer's configuration: one TOML file, frozen once read, checked once at the start.

Sections: data, model, groups.<name>, tables.<feature>, train, checkpoint. The resolved config travels with
every run, checkpoint and snapshot as data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from embeddings.errors import ConfigError
from embeddings.groups import FusedOptimizer, TableGroup, table_group
from trainer.settings import Settings, load_settings


class DataConfig(Settings):
    """What is read and how it is cut into steps.

    Attributes:
        log: folder of the sequence log.
        history_length: L, the behaviors a request may see.
        requests_per_block: consecutive requests of one user that share one block (one lookup).
        behaviors_per_block: a block is closed early when its history would grow beyond this; 0 = 2 L.
        batch_candidates: candidates of one step over all ranks, met to within one block.
        shuffle_row_groups: blocks are shuffled within this many row groups.
        ingestion_delay: seconds before a request during which behaviors are not yet visible.
        prefetch: batches prepared ahead by a reader thread.
    """

    log: Path = Path("log")
    history_length: PositiveInt = 500
    requests_per_block: PositiveInt = 8
    behaviors_per_block: int = Field(0, ge=0)
    batch_candidates: PositiveInt = 2048
    shuffle_row_groups: PositiveInt = 64
    ingestion_delay: int = Field(0, ge=0)
    prefetch: int = Field(4, ge=0)

    @property
    def block_limit(self) -> int:
        return self.behaviors_per_block or 2 * self.history_length


class RolesConfig(Settings):
    """Which table group serves each of the four roles (DARE, section 3; TWIN names one group four times)."""

    attention_target: str = "attention"
    attention_behavior: str = "attention"
    representation_target: str = "representation"
    representation_behavior: str = "representation"


class ModelConfig(Settings):
    """The two-stage model.

    Attributes:
        k: K, behaviors the search keeps for stage two.
        lookup: `selected` looks up representation rows of kept behaviors and candidates only, `full` of all.
        weights: attention over the kept behaviors: `softmax`, or unnormalised `sigmoid`.
        target_aware: feed the product of target and pooled representation to the head (TIN, DARE).
        position, age: use target-relative rank and log-bucketed age, in both stages.
        hidden: widths of the head's layers.
    """

    k: PositiveInt = 20
    lookup: Literal["selected", "full"] = "selected"
    weights: Literal["softmax", "sigmoid"] = "softmax"
    target_aware: bool = True
    position: bool = True
    age: bool = True
    hidden: tuple[PositiveInt, ...] = (200, 80)
    roles: RolesConfig = RolesConfig()


class GroupConfig(Settings):
    """One table group.

    Attributes:
        dim: vector width, one for all features or one a feature.
        features: features that have a table here; empty means all of the log.
        optimizer, learning_rate, eps: the fused optimizer of the rows.
        init_scale: initial weights are uniform in [-init_scale, init_scale].
        sharding: sharding types the planner may use; empty means what suits the device.
    """

    dim: PositiveInt | dict[str, PositiveInt] = 16
    features: tuple[str, ...] = ()
    optimizer: Literal["rowwise_adagrad", "adagrad", "sgd"] = "rowwise_adagrad"
    learning_rate: float = Field(0.05, gt=0)
    eps: float = Field(1e-8, gt=0)
    init_scale: float = Field(0.05, gt=0)
    sharding: tuple[
        Literal["table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard"], ...
    ] = ()


class TableConfig(Settings):
    """One feature's tables; `rows` defaults to the id range in the log's manifest."""

    rows: PositiveInt | None = None


class TrainConfig(Settings):
    """The training run.

    Attributes:
        seed: of every random draw: initial weights and the order of the data.
        epochs: passes over the train split.
        max_steps: stop after this many steps; 0 = no limit. Schedules run to whichever end comes first.
        learning_rate: of Adam on the dense weights.
        warmup_steps: linear warm-up of all learning rates.
        decay: `linear` lets all learning rates fall to zero at the last step.
        log_every: steps between two lines of metrics.jsonl.
        validate_every: steps between two validations; 0 = only at the end.
    """

    seed: int = Field(17, ge=0, lt=2**31)
    epochs: PositiveInt = 1
    max_steps: int = Field(0, ge=0)
    learning_rate: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(0, ge=0)
    decay: Literal["none", "linear"] = "linear"
    log_every: PositiveInt = 10
    validate_every: int = Field(0, ge=0)


class CheckpointConfig(Settings):
    """When to save (besides the end of training) and how many checkpoints to keep."""

    every_steps: int = Field(0, ge=0)
    keep: PositiveInt = 2


class Config(Settings):
    """The whole configuration of a run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    groups: dict[str, GroupConfig] = Field(
        default_factory=lambda: {"attention": GroupConfig(), "representation": GroupConfig()}
    )
    tables: dict[str, TableConfig] = Field(default_factory=dict)
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _roles_name_groups(self) -> Config:
        for role, group in self.model.roles.model_dump().items():
            if group not in self.groups:
                known = ", ".join(sorted(self.groups))
                raise ValueError(f"model.roles.{role} names group {group!r}; defined groups: {known}")
        unused = set(self.groups) - set(self.model.roles.model_dump().values())
        if unused:
            raise ValueError(
                f"group {sorted(unused)[0]!r} serves no role; remove it or name it in model.roles"
            )
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file; see `trainer.settings.load_settings` for the errors."""
    return load_settings(Config, path, overrides)


def build_groups(config: Config, rows: Mapping[str, int]) -> dict[str, TableGroup]:
    """Resolve the groups against the log's features.

    Args:
        config: the run's config.
        rows: feature -> table rows as in the log's manifest; `tables.<feature>.rows` overrides it.

    Raises:
        ConfigError: a group or table names an unknown feature, a table is smaller than the log's ids, or
            target and behavior of one role have different widths.
    """
    known = ", ".join(rows)
    for feature, table in config.tables.items():
        if feature not in rows:
            raise ConfigError(f"tables.{feature}: the log has no such feature; it has {known}")
        if table.rows is not None and table.rows < rows[feature]:
            raise ConfigError(
                f"tables.{feature}.rows = {table.rows}, but the log holds ids up to {rows[feature] - 1}"
            )
    sizes = {
        name: (config.tables[name].rows or n) if name in config.tables else n for name, n in rows.items()
    }
    groups = {}
    for name, group in config.groups.items():
        features = group.features or tuple(rows)
        for feature in features:
            if feature not in rows:
                raise ConfigError(
                    f"groups.{name}.features: the log has no feature {feature!r}; it has {known}"
                )
        dims = group.dim if isinstance(group.dim, dict) else dict.fromkeys(features, group.dim)
        missing = [feature for feature in features if feature not in dims]
        if missing:
            raise ConfigError(f"groups.{name}.dim gives no width for feature {missing[0]!r}")
        optimizer = FusedOptimizer(group.optimizer, group.learning_rate, group.eps)
        groups[name] = table_group(name, features, dims, sizes, optimizer, group.init_scale, group.sharding)
    _check_roles(config.model.roles, groups)
    return groups


def _check_roles(roles: RolesConfig, groups: Mapping[str, TableGroup]) -> None:
    for stage in ("attention", "representation"):
        target, behavior = getattr(roles, f"{stage}_target"), getattr(roles, f"{stage}_behavior")
        if groups[target].widths() != groups[behavior].widths():
            raise ConfigError(
                f"model.roles: {stage}_target ({target}) and {stage}_behavior ({behavior}) need tables of "
                f"equal widths in equal order, not {groups[target].widths()} and {groups[behavior].widths()}"
            )
