"""The file that `tune --space` reads: what is searched, with which budget, and by which rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from embeddings.errors import ConfigError
from trainer.config.toml import Settings, load_settings

Number = int | float
# A table with one of these is a parameter; any other is a section on the way to some.
_MARKS = {"low", "high", "choices"}
_EMPTY = (
    "is empty: name a key to search, such as train.learning_rate = { low = 3e-4, high = 3e-2, log = true }"
)


class StudyConfig(Settings):
    """How a study goes about it."""

    trials: PositiveInt = 20
    """The number of trials of the whole study, whatever number of workers shares them, and whatever becomes
    of a trial: pruned and failed ones count. `--trials` says otherwise. A larger number goes on with a study
    that has ended."""
    seed: int = Field(17, ge=0, lt=2**31)
    """The seed of what is drawn for the trials. Each trial draws with this seed and its own number, so that a
    study that was interrupted proposes what it would have proposed. Training itself has `train.seed`."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """How values are chosen: `tpe` looks at the trials so far (Optuna's tree-structured Parzen estimator),
    `random` does not, `grid` takes every combination in turn, for which each parameter needs choices, whole
    numbers, or a `step`."""
    random_trials: int = Field(5, ge=0)
    """`tpe` draws at random until so many trials have a value, and no trial is pruned before so many have
    come to their end."""
    pruner: Literal["median", "halving", "hyperband", "none"] = "median"
    """When a trial ends before its budget does: `median`, if its best validation so far is worse than the
    median of the other trials at that step; `halving` and `hyperband`, if it is not among the best third of
    those that came as far as this (asynchronous successive halving, Hyperband). They look at the validations
    of `train.validate_every`, which must not be 0."""
    warmup: int = Field(1, ge=0)
    """So many validations of a trial pass before it may be pruned."""
    metric: Literal["auc", "gauc", "logloss"] = "auc"
    """What is compared, on the validation split: more of `auc` and `gauc` is better, less of `logloss`."""
    task: str = ""
    """The task whose metric is compared. Empty means the first one. `*` means the mean over all tasks that
    have the metric."""
    keep: Literal["best", "all"] = "best"
    """Whose checkpoints stay on the disk: those of the best trial so far, or of all trials. Metrics and logs
    of all trials stay."""


class ParameterConfig(Settings):
    """One parameter. It is named after the key of the configuration that it sets; `*` in the name stands for
    every name at that place, which then have one value together. A range of whole numbers gives whole
    numbers, if the key's value is one."""

    keys: tuple[str, ...] = ()
    """The keys that this parameter sets, all to one value. Empty means the one that it is named after."""
    low: Number | None = None
    """The least value."""
    high: Number | None = None
    """The largest value."""
    log: bool = False
    """Whether values are drawn on a logarithmic scale."""
    step: Number | None = Field(None, gt=0)
    """The distance between two values. Not set means 1 of whole numbers, and any value of others."""
    choices: tuple[Any, ...] | None = None
    """The values to choose from, instead of a range: numbers, texts, `true` and `false`, or lists."""

    @model_validator(mode="after")
    def _check_form(self) -> ParameterConfig:
        if self.choices is not None:
            if self.model_fields_set - {"choices", "keys"}:
                raise ValueError("has choices, or low and high; give one of the two")
            if len(self.choices) < 2:
                raise ValueError("choices must be two or more; what has one value goes to [trial]")
            if any(each in self.choices[:place] for place, each in enumerate(self.choices)):
                raise ValueError("one of the choices occurs twice")
            return self
        if self.low is None or self.high is None:
            raise ValueError("needs both low and high, or choices")
        if not self.low < self.high:
            raise ValueError(f"low = {self.low} must be less than high = {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs low > 0, and no step")
        return self


class SpaceConfig(Settings):
    """A space and its study."""

    study: StudyConfig = StudyConfig()
    trial: dict[str, Any] = Field(default_factory=dict)
    """Keys of the configuration that all trials have with other values than the configuration itself, such as
    `train.max_steps`: the budget. `--set` on the command line wins over them."""
    parameters: dict[str, ParameterConfig]

    @model_validator(mode="before")
    @classmethod
    def _has_parameters(cls, given: object) -> object:
        return {"parameters": {}, **given} if isinstance(given, Mapping) else given

    @field_validator("parameters", mode="before")
    @classmethod
    def _flat(cls, given: object) -> object:
        if given == {}:
            raise ValueError(_EMPTY)
        return dict(_parameters(given, "")) if isinstance(given, Mapping) else given


def read_space(space: Path) -> SpaceConfig:
    """Raises:
    ConfigError: it is missing or no TOML, or a key or value is wrong.
    """
    if not space.exists():
        raise ConfigError(f"{space}: no such file; configs/spaces/ holds ready ones")
    return load_settings(SpaceConfig, space)


def _parameters(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """The parameters by their full names, for a dot between names without quotes makes a section of TOML."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, ParameterConfig) or (isinstance(value, Mapping) and _MARKS.intersection(value)):
            yield name, value
        elif isinstance(value, Mapping) and value:
            yield from _parameters(value, f"{name}.")
        else:
            raise ValueError(
                f"{name} is no parameter: write {{ low = ..., high = ... }} or {{ choices = [...] }}"
            )
