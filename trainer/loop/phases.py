"""Phases: what a run reads, trains and follows from one step to another, as values.

Without the section a run is one phase, which is [train] itself. Every phase has a schedule of learning rates
of its own, which starts with it, as optax joins schedules at boundaries. What a phase begins with (resets,
clones) is done once, when it is entered; a run that is resumed inside a phase only takes its settings up.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from embeddings.errors import ConfigError
from trainer.config.phases import TABLES, PhaseConfig
from trainer.config.sections import EarlyStoppingConfig, TrainConfig
from trainer.config.tasks import Task
from trainer.data.cursor import Cursor
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import LogManifest
from trainer.loop.early_stopping import check_watched
from trainer.run_config import Config

# What is said of a phase when it begins, where it is given.
_TOLD = ("weights", "freeze", "train", "heads", "update", "learning_rate", "table_learning_rates")
# Passes of a phase that ends by steps.
_ENDLESS = 1 << 40


@dataclass(frozen=True)
class Phase:
    """One phase of a run.

    Attributes:
        number: its place in the run; name: unique, empty where the run has no phases.
        place: of its settings in the section, which may stand for several.
        settings: as given; train: [train] as it is in this phase: `epochs` are its passes, `max_steps` its
            steps.
        domains: ids that it reads alone; empty = all. `each`: the one of these whose metric counts.
    """

    number: int
    name: str
    place: int
    settings: PhaseConfig
    train: TrainConfig
    domains: tuple[int, ...] = ()
    each: int | None = None

    @property
    def key(self) -> str:
        """Where its settings stand, for messages."""
        return f"phases.{self.place}" if self.name else "train"

    @property
    def reads(self) -> tuple[str, tuple[int, ...]]:
        """The split and the domains that it reads; phases with the same ones share a pass."""
        return self.settings.split, self.domains

    def line(self, count: int) -> str:
        """What it is, of so many phases."""
        settings, given = self.settings, self.settings.model_dump(exclude_defaults=True)
        length = [f"{settings.steps:,} step(s)" if settings.steps else f"{settings.passes} pass(es)"]
        if self.reads != ("train", ()):
            length.append(f"reads {settings.split}")
        if (fork := settings.fork) is not None:
            names = ", ".join(branch.name for branch in fork.branches)
            length.append(f"in each of the branches {names}, which are merged every {fork.every:,} steps")
        if self.domains:
            length.append(f"domains {', '.join(map(str, self.domains))}")
        words = [
            f"{key} = {_short(given[key])}"
            for key in _TOLD
            if key in given and given[key] not in ((), {}, "")
        ]
        return f"phase {self.number + 1} of {count}, {self.name}: {'; '.join([*length, *words])}"

    def seed(self, seed: int) -> int:
        """Of what is random when it is entered; `seed`: `train.seed`."""
        return int(np.random.SeedSequence([seed, self.number]).generate_state(1)[0] >> 1)

    def first_cursor(self, before: Phase, cursor: Cursor) -> Cursor:
        """Where it begins to read, after a phase that stopped at `cursor`."""
        unfinished = bool(cursor.blocks)
        if not unfinished or (self.settings.passes is None and self.reads == before.reads):
            return cursor
        return cursor.next_pass()


def branches_of(phase: Phase) -> tuple[Phase, ...]:
    """A phase as it is in each of its branches, as far as they train and read something else."""
    found, settings, fork = [], phase.settings, phase.settings.fork
    for place, branch in enumerate(fork.branches if fork is not None else ()):
        given: dict[str, Any] = {"weights": {**settings.weights, **branch.weights}}
        if fork is not None and fork.scope == "dense" and place:
            given["freeze"] = (*settings.freeze, TABLES)
        domains = branch.domains or phase.domains
        found.append(replace(phase, settings=settings.model_copy(update=given), domains=domains))
    return tuple(found)


def phases_of(config: Config, domains: Sequence[int] = ()) -> tuple[Phase, ...]:
    """The phases of a run, one at least.

    Args:
        domains: ids that have candidates in the train split, for phases of each domain.

    Raises:
        ConfigError: what phases say does not go with the rest of the config.
    """
    if not config.phases:
        return (Phase(0, "", 0, PhaseConfig(passes=config.train.epochs), config.train),)
    _check_beside(config)
    found: list[Phase] = []
    names = set[str]()
    for place, settings in enumerate(config.phases):
        where = f"phases.{place}"
        _check_phase(config, settings, where)
        name, train = settings.name or f"phase{place + 1}", _train_of(config.train, settings)
        if name in names:
            raise ConfigError(f"{where}.name = {name!r}: another phase is called that; give it its own name")
        names.add(name)
        of_each = (settings.domains or tuple(domains)) if settings.each else ()
        if settings.each and not of_each:
            raise ConfigError(f'{where}.each = "domain": no candidate of the train split has a domain')
        for time in range(settings.repeat):
            again = f"{name}_{time + 1}" if settings.repeat > 1 else name
            for domain in of_each or (None,):
                own = settings.domains if domain is None else (domain,)
                full = again if domain is None else f"{again}_domain{domain}"
                found.append(Phase(len(found), full, place, settings, train, own, domain))
    return tuple(found)


def phases_for(
    config: Config, manifest: LogManifest, tasks: Sequence[Task], domains: Sequence[int] = ()
) -> tuple[Phase, ...]:
    """The phases of a run.

    Args:
        domains: see `phases_of`.

    Raises:
        ConfigError: they do not go with the rest of the configuration, or with the log.
    """
    phases = phases_of(config, domains)
    for phase in phases if config.phases else ():
        if not manifest.holds(phase.settings.split):
            held = ", ".join(split for split in manifest.splits if manifest.holds(split))
            problem = f"the log has no candidates in that split; it has {held}"
            raise ConfigError(f"{phase.key}.split = {phase.settings.split!r}: {problem}")
    for phase in phases:
        stopping, where = phase.train.early_stopping, f"{phase.key}.early_stopping"
        if stopping.on and not manifest.holds("validation"):
            raise ConfigError(f"{where} needs validation requests, and the log has none")
        check_watched(stopping, tasks, manifest, where)
        if (fork := phase.settings.fork) is not None:
            if not manifest.holds("validation"):
                problem = "branches are merged by validation, and the log has no validation requests"
                raise ConfigError(f"{phase.key}.fork: {problem}")
            # As for early stopping, one task must have a metric.
            watch = EarlyStoppingConfig(task=fork.task, patience=1)
            check_watched(watch, tasks, manifest, f"{phase.key}.fork")
    return phases


def check_measured(phases: Sequence[Phase], validation: SequenceLogReader | None) -> None:
    """Raises ConfigError where branches are merged by a domain that validation does not have; collective."""
    for phase in phases:
        fork = phase.settings.fork
        if fork is None or fork.domain is None or validation is None:
            continue
        if fork.domain not in (known := validation.by_domain):
            problem = (
                f"the validation split has no candidate of that domain; it has {', '.join(map(str, known))}"
            )
            raise ConfigError(f"{phase.key}.fork.domain = {fork.domain}: {problem}")


def place_of_phase(phases: Sequence[Phase], state: dict[str, Any], where: str) -> int:
    """The number of the phase that a checkpoint stands in.

    Args:
        state: of the checkpoint; older ones know of no phase. where: it, for the message.

    Raises:
        ConfigError: the phase of that number is another one now.
    """
    number, name = int(state.get("phase", 0)), str(state.get("phase_name", ""))
    if number >= len(phases) or phases[number].name != name:
        was = f"the phase {name!r}" if name else "a run without phases"
        now = ", ".join(each.name for each in phases) or "none"
        raise ConfigError(
            f"phases: {where} stands in {was}, phase {number + 1} of its run, and phases are now {now}; keep "
            "the name and the place of that one, or name another --out"
        )
    return number


def stopping_before(config: dict[str, Any], phase: Phase) -> dict[str, Any]:
    """When a phase ended early by the config that a checkpoint keeps."""
    phases = config.get("phases", [])
    if not phases:
        return dict(config["train"].get("early_stopping", {}))
    given = phases[phase.place] if phase.place < len(phases) else {}
    return dict(given.get("early_stopping") or {})


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _train_of(train: TrainConfig, settings: PhaseConfig) -> TrainConfig:
    """[train] as it is in a phase."""
    given: dict[str, Any] = {
        "epochs": settings.passes or _ENDLESS,
        "max_steps": settings.steps or 0,
        "learning_rate": settings.learning_rate or train.learning_rate,
        "update": settings.update or train.update,
        "decay": settings.decay or train.decay,
        "tables": settings.tables or train.tables,
    }
    if settings.warmup is not None or settings.warmup_steps is not None:
        given |= {"warmup": settings.warmup or 0.0, "warmup_steps": settings.warmup_steps}
    if settings.early_stopping is not None:
        given["early_stopping"] = settings.early_stopping
    return train.model_copy(update=given)


def _check_beside(config: Config) -> None:
    """Raise ConfigError where [train] says what phases say."""
    if config.train.epochs != 1:
        raise ConfigError(
            f"train.epochs = {config.train.epochs}: there are phases; set phases.0.passes instead"
        )
    if config.train.early_stopping.on:
        raise ConfigError("train.early_stopping: there are phases; set phases.0.early_stopping instead")


def _check_phase(config: Config, settings: PhaseConfig, where: str) -> None:
    if (settings.domains or settings.each) and not config.data.domain:
        key = "domains" if settings.domains else "each"
        raise ConfigError(
            f"{where}.{key}: there are no domains; name the feature that has them in data.domain"
        )
    if settings.stops and not config.train.validate_every:
        raise ConfigError(
            f"{where}.early_stopping counts validations: set train.validate_every to the steps between two"
        )
    _check_average(settings, where)
    _known(settings.table_learning_rates, config.groups, f"{where}.table_learning_rates")
    weights = {f"{where}.weights": settings.weights}
    fork = settings.fork
    if fork is not None:
        if not config.data.domain and (fork.domain is not None or any(b.domains for b in fork.branches)):
            problem = "there are no domains; name the feature that has them in data.domain"
            raise ConfigError(f"{where}.fork: {problem}")
        if fork.scope == "dense" and settings.train:
            raise ConfigError(f'{where}.train: with fork.scope = "dense" say with freeze what stays instead')
    for place, branch in enumerate(fork.branches if fork is not None else ()):
        weights[f"{where}.fork.branches.{place}.weights"] = branch.weights
    for key, given in weights.items() if config.tasks else ():
        _known(given, config.tasks, key)


def _check_average(settings: PhaseConfig, where: str) -> None:
    average, stops = settings.average, settings.stops
    if stops and (average.kind == "beta" or average.adopt):
        key = 'average.kind = "beta"' if average.kind == "beta" else "average.adopt"
        raise ConfigError(
            f"{where}: {key} needs the end of the phase to be known, and early_stopping may end it earlier, "
            'with its best weights; take average.kind = "ema" without adopt, or no early_stopping'
        )


def _known(names: Collection[str], known: Collection[str], where: str) -> None:
    if unknown := sorted(set(names) - set(known)):
        raise ConfigError(f"{where} names {unknown[0]!r}; it may name {', '.join(known)}")
