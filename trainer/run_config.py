"""The trainer's configuration: one TOML file, which is checked and frozen when it is read.

Every run, checkpoint and snapshot holds the resolved config as data.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from pathlib import Path

from pydantic import Field, model_validator

from embeddings.errors import ConfigError
from embeddings.groups import TableGroup, TableSpec
from embeddings.ids.rules import IdRules, part_name
from embeddings.optimizers import FusedOptimizer
from trainer.config.ids import FORK_WITH_IDS, IdsConfig, against_ids, rules_of, time_group_with_ids
from trainer.config.model import CONTEXT_ROLES, OPTIONAL_ROLES, section_of
from trainer.config.online import OnlineConfig
from trainer.config.per_task import against_per_task
from trainer.config.phases import PhaseConfig, UpdateRule
from trainer.config.sections import CheckpointConfig, CommsConfig, DataConfig, TrainConfig
from trainer.config.sets import against_owners, against_sets, sets_of
from trainer.config.tables import (
    GroupConfig,
    GroupName,
    PlanConfig,
    TableConfig,
    against_init_like,
    against_vectors,
)
from trainer.config.tasks import Task, TaskConfig, TaskName
from trainer.config.toml import Settings, Sources, load_settings, naming
from trainer.model.settings import BranchConfig, ModelConfig


class Config(Settings):
    """The whole configuration of a run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    groups: dict[GroupName, GroupConfig] = Field(
        default_factory=lambda: {"attention": GroupConfig(), "representation": GroupConfig()}
    )
    tables: dict[str, TableConfig] = Field(default_factory=dict)
    ids: dict[str, IdsConfig] = Field(default_factory=dict)
    tasks: dict[TaskName, TaskConfig] = Field(default_factory=dict)
    train: TrainConfig = TrainConfig()
    phases: tuple[PhaseConfig, ...] = ()
    comms: CommsConfig = CommsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    plan: PlanConfig = PlanConfig()
    online: OnlineConfig = OnlineConfig()

    @model_validator(mode="after")
    def _check_roles(self) -> Config:
        used = set()
        for branch, settings in self.model.all_branches().items():
            for role, group in settings.roles.model_dump().items():
                if group not in self.groups and (group or role not in OPTIONAL_ROLES):
                    known = ", ".join(sorted(self.groups))
                    raise ValueError(
                        f"{section_of(branch)}.roles.{role} names group {group!r}; defined groups: {known}"
                    )
            used |= settings.roles.used()
            whole = self.model.roles.representation_target
            for problem in against_sets(self.groups, whole, section_of(branch), settings, self.data.domain):
                raise ValueError(problem)
            self._check_data(branch, settings)
            self._check_content(branch, settings)
        name, head = self.model.roles.representation_behavior, self.model.head_kind
        takes = (head.takes_sets, head.takes_owners)
        problems = against_owners(name, self.groups[name].sets, self.model.head, *takes)
        for problem in (*problems, *against_init_like(self.groups)):
            raise ValueError(problem)
        unused = set(self.groups) - used
        if unused:
            raise ValueError(
                f"group {sorted(unused)[0]!r} serves no role; remove it or name it in model.roles"
            )
        return self

    @model_validator(mode="after")
    def _check_ids(self) -> Config:
        for problem in against_ids(self.ids, self.groups, self.tables, self.plan, self.data, self.train):
            raise ValueError(problem)
        if self.ids and any(phase.fork is not None for phase in self.phases):
            raise ValueError(FORK_WITH_IDS)
        for branch in self.model.all_branches().values():
            if branch.time_group in self.ids:
                raise ValueError(time_group_with_ids(branch.time_group))
        return self

    @property
    def id_rules(self) -> dict[str, IdRules]:
        """Name of a map of ids that come and go -> its rules, see `IdsConfig.rules`."""
        return rules_of(self.ids, self.train.seed)

    def own_keys(self, group: str) -> tuple[dict[str, str], dict[str, int]]:
        """What `TableGroup.with_keys` wants: features of which the group has its own capacity."""
        keys = {
            feature: part_name(feature, group) for feature, ids in self.ids.items() if group in ids.groups
        }
        return keys, {name: rules.rows for name, rules in self.id_rules.items()}

    @model_validator(mode="after")
    def _check_towers(self) -> Config:
        for name, task in self.tasks.items():
            if task.tower is not None and not self.model.head_kind.takes_towers:
                raise ValueError(
                    f'tasks.{name}.tower: model.head = "{self.model.head}" has no tower for each task; set '
                    'model.head = "experts", or leave tower out'
                )
        return self

    @model_validator(mode="after")
    def _check_per_task(self) -> Config:
        if "per_task" not in self.rules:
            return self
        key = 'train.update = "per_task"'
        if self.train.update != "per_task":
            key = 'update = "per_task" of a phase'
        covariance = self.model.head_kind.gives_experts(self.model)
        for number, phase in enumerate(self.phases):
            if phase.heads == "tied" and (phase.update or self.train.update) == "per_task":
                raise ValueError(
                    f'phases.{number}.heads = "tied" adds up gradients of copies of one map, and with update '
                    '= "per_task" each task has its own; set update = "summed" for that phase'
                )
        for problem in against_per_task(self.train, self.groups, self.plan, covariance):
            raise ValueError(f"{key}: {problem}")
        return self

    @property
    def given_groups(self) -> frozenset[str]:
        """The groups whose rows are pre-trained vectors."""
        return frozenset(name for name, group in self.groups.items() if group.vectors)

    def with_first_weights(self) -> Config:
        """The same with the first weights of every group as if they had been given."""
        scored = set[str]().union(*(each.scored_groups for each in self.model.all_branches().values()))
        groups = {
            # What draws no numbers keeps what was given, so that it can be said to have no effect.
            name: group if group.vectors else group.with_first_weights(name in scored)
            for name, group in self.groups.items()
        }
        return self.model_copy(update={"groups": groups})

    @property
    def rules(self) -> Set[UpdateRule]:
        """The update rules of all phases."""
        return {phase.update or self.train.update for phase in self.phases} or {self.train.update}

    def lanes(self, tasks: Sequence[Task]) -> tuple[str, ...]:
        """The tasks that have a state of their own wherever the rule is `per_task`, in their order.

        They are those that some phase trains by a loss of their own. Empty where no phase has that rule.
        """
        if "per_task" not in self.rules:
            return ()
        phases = [phase.weights for phase in self.phases]
        phases += [each.weights for phase in self.phases if phase.fork for each in phase.fork.branches]
        return tuple(
            task.name
            for task in tasks
            if task.settings.loss != "none"
            and (task.weight or any(weights.get(task.name) for weights in phases))
        )

    def losses_of(self, tasks: Sequence[Task], owner: str) -> tuple[str, ...]:
        """Those of `lanes` whose losses reach a set of this owner, see `EmbeddingSet.losses`."""
        kind, _, name = owner.partition(":")
        alone = kind == "task" and self.model.head_kind.keeps_sets_apart(self.model)
        trained = self.lanes(tasks)
        return tuple(
            task.name for task in tasks if task.name in trained and not (alone and name not in task.towers)
        )

    def without_lanes(self) -> Config:
        """The same model as it is served: its tables are those that lanes are folded into."""
        summed = [phase.model_copy(update={"update": "summed"}) for phase in self.phases]
        train = self.train.model_copy(update={"update": "summed"})
        return self.model_copy(update={"train": train, "phases": tuple(summed)})

    def _check_content(self, branch: str, settings: BranchConfig) -> None:
        """Raise an error if groups name vectors that there are not, or a branch lacks those it compares."""
        for problem in against_vectors(self.groups, self.data.vectors, self.ids):
            raise ValueError(problem)
        roles = settings.roles
        if settings.sequence_kind.needs_content and not (
            self.groups[roles.attention_target].vectors and self.groups[roles.attention_behavior].vectors
        ):
            raise ValueError(
                f'branch {branch!r}: sequence = "{settings.sequence}" compares contents: let both attention '
                "roles name a group whose rows are pre-trained, see groups.<name>.vectors"
            )

    def _check_data(self, branch: str, settings: BranchConfig) -> None:
        """Raise an error if the reader does not deliver what a branch works on."""
        data = self.data
        if settings.level and not data.search.levels:
            raise ValueError("model.level needs a hard search while reading: set data.search.levels")
        if settings.clusters and not data.clusters:
            raise ValueError("model.clusters needs data.clusters = true, and a log that `cluster` wrote")
        if data.clusters and not settings.clusters and not settings.newest:
            raise ValueError(
                f"data.clusters leaves branch {branch!r} no single behaviors: set its clusters too"
            )
        cut = bool(data.search.levels) or data.clusters
        if cut and settings.sequence_kind.two_towers and not settings.newest:
            raise ValueError(
                f'branch {branch!r}: sequence = "{settings.sequence}" must not see which behaviors a search '
                'retrieved for a candidate; set search = "recent"'
            )
        if cut and settings.sequence_kind.needs_stretch and not settings.newest:
            raise ValueError(
                f'branch {branch!r}: sequence = "{settings.sequence}" reads stretches of the history, and '
                'data.search or data.clusters leaves gaps; set search = "recent"'
            )
        kind = self.model.auxiliary_kind
        if cut and branch == "main" and kind is not None and kind.retrieves and not settings.newest:
            raise ValueError(
                f'model.auxiliary = "{self.model.auxiliary}" must not see which behaviors a search retrieved '
                'for a candidate; leave data.search and data.clusters out, or set search = "recent"'
            )
        if cut and data.recent < settings.newest:
            raise ValueError(
                f"branch {branch!r} looks at the {settings.newest} newest behaviors, of which data.search or "
                f"data.clusters may leave out some: set data.recent = {settings.newest}"
            )
        if data.clusters and data.search.levels:
            raise ValueError("data.clusters and data.search.levels both cut the history; use one")


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file; see `trainer.config.toml.load_settings` for the errors.

    What first weights are by default is filled in, so that a run keeps its own where a later version has
    others.
    """
    return load_settings(Config, path, overrides).with_first_weights()


def of_files(path: Path, overrides: Sequence[str] = ()) -> AbstractContextManager[None]:
    """Have errors about keys of a config name the file or the override that set them."""
    return naming(Sources.read(path, overrides), Config)


def build_groups(
    config: Config,
    item_rows: Mapping[str, int],
    context_rows: Mapping[str, int] | None = None,
    tasks: Sequence[Task] = (),
) -> dict[str, TableGroup]:
    """The table groups of a run, with one table for each feature of a group.

    Args:
        config: the run's config.
        item_rows: feature of behaviors and candidates -> its rows in the log's manifest. A larger
            `tables.<feature>.rows` of the config counts instead.
        context_rows: the same for the features of a request. Only groups of the roles `context` and
            `prior_context` may have them.
        tasks: of the run, for groups that have a set for each.

    Raises:
        ConfigError: a group or table names an unknown feature, a table is too small for the log's ids, or
            target and behavior of one role have different widths.
    """
    rows = {**item_rows, **(context_rows or {})}
    known = ", ".join(rows)
    for feature, table in config.tables.items():
        if feature not in rows:
            raise ConfigError(f"tables.{feature}: the log has no such feature; it has {known}")
        if table.rows is not None and table.rows < rows[feature]:
            raise ConfigError(
                f"tables.{feature}.rows = {table.rows}, but the log holds ids up to {rows[feature] - 1}"
            )
    sizes = {**rows, **{name: table.rows for name, table in config.tables.items() if table.rows}}
    sizes |= {feature: each.rows for feature, each in config.id_rules.items()}
    groups = {}
    for name, group in config.with_first_weights().groups.items():
        of_context = name in [getattr(config.model.roles, role) for role in CONTEXT_ROLES]
        allowed = (context_rows or {}) if of_context else item_rows
        own = {feature: sizes[feature] for feature in allowed}
        groups[name] = _build_group(name, group, own, tasks, sizes.get(config.data.domain, 0))
        groups[name] = groups[name].with_keys(*config.own_keys(name))
    for branch in config.model.all_branches().values():
        _check_branch(branch, groups)
    _check_model(config, groups)
    return groups


def _build_group(
    name: str, group: GroupConfig, rows: Mapping[str, int], tasks: Sequence[Task], domains: int
) -> TableGroup:
    """One group: over the features that it names, or over all features of `rows`."""
    features = group.features or tuple(rows)
    if not features:
        raise ConfigError(f"groups.{name}: the log has no context features; leave model.roles.context empty")
    for feature in features:
        if feature not in rows:
            has = ", ".join(rows)
            raise ConfigError(f"groups.{name}.features: the log has no feature {feature!r}; it has {has}")
    dims = group.dim if isinstance(group.dim, dict) else dict.fromkeys(features, group.dim)
    missing, stray = set(features) - set(dims), set(dims) - set(features)
    if missing:
        raise ConfigError(f"groups.{name}.dim gives no width for feature {sorted(missing)[0]!r}")
    if stray:
        problem = f"{sorted(stray)[0]!r}, which is no feature of the group"
        raise ConfigError(f"groups.{name}.dim gives a width for {problem}")
    optimizer = FusedOptimizer(group.optimizer, group.learning_rate, group.eps, group.max_gradient)
    kinds = (group.sharding, group.kind, group.dtype, group.fusion, group.stochastic_rounding)
    sets = sets_of(name, group, tasks, domains)
    tables = tuple(
        TableSpec(feature, rows[feature], settings.dim or dims[feature], set_.name)
        for set_, settings in sets.items()
        for feature in features
    )
    return TableGroup(
        name,
        tables,
        optimizer,
        group.first_weights(),
        *kinds,
        sets=tuple(sets),
        like=group.init_like,
        given=bool(group.vectors),
    )


def _check_model(config: Config, groups: Mapping[str, TableGroup]) -> None:
    model, domain = config.model, config.data.domain
    sets = groups[model.roles.representation_behavior].sets
    if model.auxiliary_reads and all(each.owner != "shared" for each in sets):
        raise ConfigError(
            f'model.auxiliary = "{model.auxiliary}" is a loss of all tasks, which reads the shared sets, but '
            f"all sets of groups.{model.roles.representation_behavior} have owners: add one that is shared"
        )
    tables = {feature for group in groups.values() for feature in group.features}
    for key, feature in {} if model.auxiliary_kind is None else model.auxiliary_kind.features(model).items():
        _check_table(f"model.{key}", feature, tables)
    reads = model.head_kind.reads_domain(model) or any(each.owner.startswith("domain:") for each in sets)
    if domain and domain not in tables and reads:
        raise ConfigError(
            f"data.domain = {domain!r}: the model reads it, but no group has a table of it, so a service "
            f"would not be given it; add it to the features of a group. Tables: {', '.join(sorted(tables))}"
        )


def _check_branch(branch: BranchConfig, groups: Mapping[str, TableGroup]) -> None:
    roles = branch.roles
    for stage in ("attention", "representation"):
        target, behavior = getattr(roles, f"{stage}_target"), getattr(roles, f"{stage}_behavior")
        if groups[target].widths() != groups[behavior].widths():
            raise ConfigError(
                f"model.roles: {stage}_target ({target}) and {stage}_behavior ({behavior}) need tables of "
                f"equal widths in equal order, not {groups[target].widths()} and {groups[behavior].widths()}"
            )
    representation = groups[roles.representation_behavior]
    for name in representation.set_names:
        problem = branch.sequence_kind.width_problem(branch, representation.of_set(name).width)
        if problem:
            raise ConfigError(problem)
    attention = groups[roles.attention_behavior].features
    if branch.attend and groups[roles.attention_behavior].fusion == "sum":
        raise ConfigError(
            f'model.attend: group {roles.attention_behavior} sums its features (fusion = "sum"); give the '
            "attended ones a group of their own"
        )
    for feature in branch.attend or ():
        if feature not in attention:
            raise ConfigError(
                f"model.attend: group {roles.attention_behavior} has no feature {feature!r}; it has "
                f"{', '.join(attention)}"
            )
    tables = {feature for group in groups.values() for feature in group.features}
    for key, (feature, _) in branch.compared_features().items():
        _check_table(f"model.{key}", feature, tables)


def _check_table(where: str, feature: str, tables: Collection[str]) -> None:
    if feature not in tables:
        raise ConfigError(
            f"{where}: no group has a table of {feature!r}; tables: {', '.join(sorted(tables))}"
        )
