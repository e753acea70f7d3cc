"""What a study is: a configuration, a space, a budget, and a log with a validation split."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from embeddings.errors import ConfigError
from pipelines.tune.literals import literal
from pipelines.tune.settings import StudyConfig, read_space
from pipelines.tune.space import Parameter, overlap, resolve
from trainer.checkpoint.compatible import log_fingerprint
from trainer.config.sections import EarlyStoppingConfig
from trainer.config.tasks import resolve_tasks
from trainer.config.toml import Sources, flat_settings
from trainer.log.schema import read_manifest
from trainer.loop.early_stopping import LOWER_IS_BETTER, check_watched
from trainer.run_config import Config, load_config

# Keys that may change from one start of a study to the next: what is trained stays the same.
_FREE = ("study.trials", "study.keep", "data.log")


@dataclass(frozen=True)
class StudyPlan:
    """A study before its first trial.

    Attributes:
        config: the file of the configuration; given: overrides of the command line.
        space: the file of the space; budget: overrides that it has for all trials.
        settings: its section [study], with the number of trials that counts.
        parameters: held against the configuration; base: the configuration as it is, within the budget.
        fingerprint: of the log.
    """

    config: Path
    given: tuple[str, ...]
    space: Path
    budget: tuple[str, ...]
    settings: StudyConfig
    parameters: tuple[Parameter, ...]
    base: Config
    fingerprint: str

    def overrides(self, drawn: Mapping[str, Any]) -> list[str]:
        """All overrides of a trial, in order; `drawn`: parameter -> what was drawn for it."""
        own = [text for each in self.parameters for text in each.overrides(drawn[each.name])]
        return [*self.budget, *self.given, *own]

    def check_unchanged(self) -> None:
        """Raises ConfigError where the files of the configuration have changed since the study was begun."""
        if load_config(self.config, (*self.budget, *self.given)) != self.base:
            raise ConfigError(
                f"{self.config}, or what it extends, has changed since this worker began; trials cannot be "
                "compared: change it back, or give the changed one another --out"
            )

    @property
    def watch(self) -> EarlyStoppingConfig:
        """The metric that trials are compared by, in the form of early stopping."""
        return EarlyStoppingConfig(metric=self.settings.metric, task=self.settings.task, patience=1)

    @property
    def lower_is_better(self) -> bool:
        return self.settings.metric in LOWER_IS_BETTER

    @property
    def defaults(self) -> dict[str, Any]:
        """What would be drawn for the configuration as it is, of parameters in whose range that lies."""
        tree = self.base.model_dump(mode="json")
        found = {each.name: each.default(tree)[0] for each in self.parameters}
        return {name: drawn for name, drawn in found.items() if drawn is not None}

    @cached_property
    def outside(self) -> list[str]:
        """Why the configuration as it is, is no point of the space; empty if it is one."""
        tree = self.base.model_dump(mode="json")
        found = [f"{each.name}: {why}" for each in self.parameters if (why := each.default(tree)[1])]
        return [*found, *self._brought_along(tree)]

    def _brought_along(self, tree: Mapping[str, Any]) -> Iterator[str]:
        """What else changes where a parameter's keys are set to what the configuration has anyway.

        A key that is set may decide what another one is by default: `init_scale` alone makes `init` uniform.
        """
        here = dict(flat_settings(tree))
        for parameter in self.parameters:
            own = parameter.present(tree)
            same = load_config(self.config, (*self.budget, *self.given, *own)).model_dump(mode="json")
            there = dict(flat_settings(same))
            changed = [
                key
                for key in {**here, **there}
                if here.get(key) != there.get(key) and not any(overlap(key, each) for each in parameter.keys)
            ]
            if changed:
                now = ", ".join(f"{key} = {there.get(key)}, and not {here.get(key)}" for key in changed)
                lines = ", ".join(
                    f"{key} = {literal(here[key])}" for key in changed if here.get(key) is not None
                )
                advice = f"; to keep that, write {lines} in [trial]" if lines else ""
                yield f"{parameter.name}: a trial that sets its keys has {now}{advice}"

    def fixed(self, number: int) -> dict[str, Any]:
        """What is not left to the sampler in a trial: its first one is the configuration as it is."""
        if number == 0:
            return self.defaults
        if self.settings.sampler != "grid":
            return {}
        return self.grid[number - 1] if self.outside else self.grid[number]

    @property
    def grid(self) -> list[dict[str, Any]]:
        """Every combination, in an order that is drawn; the configuration as it is comes first.

        Raises:
            ConfigError: a parameter has no grid.
        """
        names = [each.name for each in self.parameters]
        points = [
            dict(zip(names, values, strict=True))
            for values in itertools.product(*(each.grid for each in self.parameters))
        ]
        order = np.random.default_rng(self.settings.seed).permutation(len(points))
        defaults = self.defaults
        return sorted((points[place] for place in order), key=lambda point: point != defaults)

    @property
    def trials(self) -> int:
        """The number of trials of the study."""
        if self.settings.sampler != "grid":
            return self.settings.trials
        # Where the configuration is no point of the grid, its nearest one is a trial besides.
        return min(self.settings.trials, len(self.grid) + bool(self.outside))

    @property
    def log(self) -> str:
        """Where the log is, from whichever folder one looks."""
        return str(self.base.data.absolute().log)

    @property
    def facts(self) -> dict[str, Any]:
        """What must not change while a study goes on, as `key -> value`."""
        tree = {"study": self.settings.model_dump(mode="json"), **self.base.model_dump(mode="json")}
        facts = {key: value for key, value in flat_settings(tree) if key not in _FREE}
        ranges = {f"parameters.{each.name}": each.definition for each in self.parameters}
        return {**facts, **ranges, "log": self.fingerprint}


def read_plan(config: Path, space: Path, overrides: Sequence[str], trials: int = 0) -> StudyPlan:
    """Read all that a study is made of, and hold it together.

    Args:
        trials: another number of them than the space's; 0 = that.

    Raises:
        TandemError: a key or a value is wrong, or the log cannot tell what is to be compared.
    """
    given = read_space(space)
    settings = given.study.model_copy(update={"trials": trials}) if trials else given.study
    budget = tuple(f"{key}={literal(value)}" for key, value in flat_settings(given.trial))
    base = _load(config, (*budget, *overrides), given_by=budget, space=space)
    tree = base.model_dump(mode="json")
    try:
        parameters = tuple(resolve(name, each, tree) for name, each in given.parameters.items())
    except ConfigError as error:
        raise ConfigError(f"{space}: {error}") from None
    manifest = read_manifest(base.data.log)
    plan = StudyPlan(
        config, tuple(overrides), space, budget, settings, parameters, base, log_fingerprint(manifest)
    )
    _check_once(plan)
    _check_corners(plan)
    if not manifest.holds("validation"):
        raise ConfigError(f"{base.data.log} has no validation split, which trials are compared on")
    check_watched(plan.watch, resolve_tasks(base.tasks, manifest.tasks), manifest, "study")
    if settings.pruner != "none" and not base.train.validate_every:
        raise ConfigError(
            f'{space}: study.pruner = "{settings.pruner}" looks at validations in the middle of a trial: set '
            'validate_every in [trial.train] to the steps between two, or pruner = "none"'
        )
    if settings.sampler == "grid":
        _ = plan.grid
    return plan


def _load(config: Path, overrides: Sequence[str], given_by: Sequence[str], space: Path) -> Config:
    """The configuration; an error about an override that the space gives names the space."""
    try:
        return load_config(config, overrides)
    except ConfigError as error:
        text = str(error)
        for override in given_by:
            text = text.replace(f"--set {override}", f"{space}: {override}")
        raise ConfigError(text) from None


def _check_once(plan: StudyPlan) -> None:
    """Raises ConfigError where a key is set by two parameters, or by a parameter and --set or the budget."""
    owners: dict[str, str] = {}
    for parameter in plan.parameters:
        for key in parameter.keys:
            for other in filter(partial(overlap, key), owners):
                raise ConfigError(
                    f"{plan.space}: {key} is set by two parameters, {owners[other]} and {parameter.name}"
                    if owners[other] != parameter.name
                    else f"{plan.space}: parameters.{parameter.name} names {key} twice"
                )
            owners[key] = parameter.name
    sources = [(f"--set {each}", each) for each in plan.given]
    sources += [(f"{plan.space}: [trial] sets {each}", each) for each in plan.budget]
    for where, override in sources:
        for key, _ in flat_settings(Sources((), (override,)).tree()):
            for other in filter(partial(overlap, key), owners):
                there = "[parameters]" if override in plan.budget else plan.space
                raise ConfigError(f"{where}: {there} searches that, by {owners[other]}; leave one out")


def _check_corners(plan: StudyPlan) -> None:
    """Hold the ends of every range, and every choice, against the configuration, one parameter at a time."""
    for parameter in plan.parameters:
        for drawn in parameter.corners:
            own = parameter.overrides(drawn)
            _load(plan.config, (*plan.budget, *plan.given, *own), (*plan.budget, *own), plan.space)
