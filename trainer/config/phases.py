"""The section phases of the trainer's configuration: how a run moves through time."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, StringConstraints, model_validator

from trainer.config.mistakes import NAME
from trainer.config.sections import Decay, EarlyStoppingConfig, TableRatesConfig
from trainer.config.tables import GroupName
from trainer.config.tasks import TaskName
from trainer.config.toml import Settings

PhaseName = Annotated[str, StringConstraints(pattern=NAME)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
UpdateRule = Literal["summed", "per_task"]
# What `freeze` and `reset` call all table groups, and all weights that are no table's.
TABLES, DENSE, GROUP = "tables", "dense", "groups."


class AverageConfig(Settings):
    """An average of the dense weights of a phase, which is kept beside them."""

    kind: Literal["none", "beta", "ema"] = "none"
    """`beta` weighs the weights after each step by a Beta distribution over the phase, whose number of steps
    must be known (CLIPood's Beta moving average). `ema` is an exponential moving average."""
    beta: float = Field(0.5, gt=0, allow_inf_nan=False)
    """With `beta`, both parameters of the distribution: below 1 the first and the last weights count most, 1
    weighs all alike."""
    decay: float = Field(0.999, ge=0, lt=1)
    """With `ema`, what is kept of the average in each step."""
    adopt: bool = False
    """Whether the weights become the average at the end of the phase. Otherwise the average ends with it, but
    for the last phase, whose average `evaluate` and `export` can take."""

    @property
    def on(self) -> bool:
        return self.kind != "none"

    @model_validator(mode="after")
    def _check_together(self) -> AverageConfig:
        if not self.on and self.adopt:
            raise ValueError('average.adopt: there is no average; set average.kind = "beta" or "ema"')
        return self


class BranchOfFork(Settings):
    """One branch of a ForkMerge phase."""

    name: PhaseName
    """The branch's name, in metrics and messages."""
    weights: dict[TaskName, Weight] = Field(default_factory=dict)
    """For the name of a task, its weight in this branch. The others keep that of the phase."""
    domains: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """The domains whose candidates train in this branch. Empty means those of the phase."""


class ForkConfig(Settings):
    """Branches that start from the same weights and are merged again (ForkMerge)."""

    branches: tuple[BranchOfFork, ...]
    """The branches, two or more. The first one is the target's own."""
    every: PositiveInt
    """The number of steps that each branch trains from a fork to the next merge. The last round ends with the
    phase."""
    task: TaskName | Literal[""] = ""
    """The task whose metric on the validation split decides how much of each branch is taken. Empty means the
    first one."""
    domain: int | None = Field(None, ge=0)
    """The metric is that of this domain alone. Not set means all candidates."""
    metric: Literal["auc", "gauc", "logloss"] = "auc"
    """That metric."""
    grid: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """The shares that are tried of a branch when it is mixed into the merge."""
    keep: int = Field(0, ge=0)
    """The number of branches that go on after the first merge: the target's own, and of the others the best.
    0 means all."""
    scope: Literal["all", "dense"] = "all"
    """What is merged: all weights, or the dense ones alone, where the tables are those of the first branch.
    `dense` is not what the paper calls ForkMerge."""

    @model_validator(mode="after")
    def _check_together(self) -> ForkConfig:
        names = [branch.name for branch in self.branches]
        if len(names) < 2:
            raise ValueError("fork.branches: give two branches or more, the target's own first")
        if len(set(names)) < len(names):
            raise ValueError(f"fork.branches: two have the same name, of {', '.join(names)}")
        if not {0.0, 1.0} <= set(self.grid):
            raise ValueError("fork.grid must have 0 and 1, so that any branch alone can be taken")
        if self.keep == 1 or self.keep > len(names):
            raise ValueError(f"fork.keep = {self.keep}: keep 2 to {len(names)} branches, or 0 for all")
        return self


class PhaseConfig(Settings):
    """One phase of a run. Without phases a run is one phase, as [train] says.

    See docs/schedules.md. What a phase does not say is as in [train].
    """

    name: PhaseName | Literal[""] = ""
    """The phase's name, in metrics and messages. Empty means `phase` and its number."""
    passes: PositiveInt | None = None
    """The length of the phase as a number of passes over the candidates that it reads. It begins a new
    pass."""
    steps: PositiveInt | None = None
    """Its length as a number of steps. It goes on in the pass of the phase before, if that reads the same
    candidates, and begins new passes as often as needed."""
    repeat: PositiveInt = 1
    """How many times the phase comes in a row, with its resets each time."""
    each: Literal["", "domain"] = ""
    """`domain` has the phase once for each domain of data.domain that has candidates, or that `domains`
    names, each reading that domain alone."""
    split: str = "train"
    """The split of the log that it trains on."""
    domains: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """The ids of data.domain whose candidates train. Empty means all."""
    weights: dict[TaskName, Weight] = Field(default_factory=dict)
    """For the name of a task, its weight in this phase. The others keep that of [tasks]. A task of weight 0
    is measured and not trained: its own dense weights stay as they are."""
    freeze: tuple[str, ...] = ()
    """What does not move: `tables`, `groups.<name>`, `dense`, or the beginning of the names of dense weights,
    such as `head.towers`, where `*` stands for any one name between dots. Neither weights nor the state of
    their optimizers change."""
    train: tuple[str, ...] = ()
    """What alone moves, in the same words, instead of `freeze`."""
    reset: tuple[str, ...] = ()
    """What begins with new random weights, in the same words, and with a new state of its optimizer."""
    reset_state: tuple[str, ...] = ()
    """Whose optimizer's state begins anew, in the same words, while the weights stay."""
    heads: Literal["own", "tied"] = "own"
    """With `model.towers.per = "domain"`, `tied` keeps the towers' maps of all domains equal, so that they
    are one head (D-Train). The next phase with `own` goes on from clones of it."""
    update: UpdateRule | None = None
    """The update rule of the phase, see train.update."""
    learning_rate: Rate | None = None
    """The learning rate of the dense weights."""
    table_learning_rates: dict[GroupName, Rate] = Field(default_factory=dict)
    """For the name of a group, the learning rate of its rows."""
    warmup: float | None = Field(None, ge=0, lt=1)
    """As train.warmup, of this phase. Every phase has a schedule of its own, which starts again with it."""
    warmup_steps: int | None = Field(None, ge=0)
    """As train.warmup_steps, of this phase."""
    decay: Decay | None = None
    """As train.decay, of this phase."""
    tables: TableRatesConfig | None = None
    """As train.tables, of this phase."""
    average: AverageConfig = AverageConfig()
    """An average of the dense weights, see [phases.average]."""
    early_stopping: EarlyStoppingConfig | None = None
    """As train.early_stopping, but it ends the phase, which then goes back to its best weights. With `each =
    "domain"` the metric is that of the domain."""
    fork: ForkConfig | None = None
    """Branches of the phase, see [phases.fork]."""

    @model_validator(mode="after")
    def _check_together(self) -> PhaseConfig:
        if (self.passes is None) == (self.steps is None):
            raise ValueError("give a phase either passes or steps")
        if self.freeze and self.train:
            raise ValueError("freeze says what stays, train what alone moves: give one of them")
        if self.average.kind == "beta" and self.steps is None:
            raise ValueError(
                'average.kind = "beta" must know the number of steps: set steps instead of passes'
            )
        if self.fork is not None:
            for key, given in (
                ("average", self.average.on),
                ("each", self.each),
                ("early_stopping", self.stops),
            ):
                if given:
                    raise ValueError(f"fork and {key} do not go together: give them to phases of their own")
        return self

    @property
    def stops(self) -> bool:
        return self.early_stopping is not None and self.early_stopping.on
