"""The study as its workers share it: Optuna's trials in a journal, and who has taken which of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from embeddings.errors import ConfigError
from pipelines.tune.plan import StudyPlan
from pipelines.tune.rules import pruner_of, sampler_of
from trainer.sealed_folder import locked, write_text

State = Literal["complete", "pruned", "failed", "stopped"]
_STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
# Of a hash, in messages.
_DIGITS = 8
# What ends the definition of a parameter, and is repeated only if it has changed.
_KEYS = ", keys = "
_NO_LOCKS = "two workers may take the same trial; run one worker"


@dataclass(frozen=True)
class Claim:
    """A trial that this worker has taken.

    Attributes:
        drawn: parameter -> what was drawn for it; starts: how often it was taken, this time included.
        pruned: it was to end, and its worker died before it had.
    """

    number: int
    drawn: dict[str, Any]
    starts: int = 1
    pruned: bool = False


@dataclass(frozen=True)
class Validation:
    """A validation of a trial.

    Attributes:
        value: the metric; cpu_s: of this start, up to here; last: after it nothing is left to train.
    """

    step: int
    value: float
    cpu_s: float = 0.0
    last: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a trial; a stopped one is taken up by the next start of a worker.

    Attributes:
        value: of a complete trial; steps, cpu_s: that it has trained; reason: why it failed.
    """

    state: State
    value: float = math.nan
    steps: int = 0
    cpu_s: float = 0.0
    reason: str = ""


@dataclass
class SharedStudy:
    """A study that several processes may work on, each with its own object of this class.

    What decides who does what happens under one lock of the folder. A worker holds a lock of the trial that
    it has taken, for as long as it lives: a trial that runs, and whose lock is free, was its worker's when
    that died, and is taken up by the next one that asks, with the same number and values.
    """

    plan: StudyPlan
    folder: Path
    url: str = ""
    study: optuna.Study = field(init=False)
    _storage: BaseStorage = field(init=False)
    _trial: Trial | None = field(init=False, default=None)
    # CPU seconds of earlier starts of the trial.
    _spent: float = field(init=False, default=0.0)
    _held: ExitStack = field(init=False, default_factory=ExitStack)

    def __post_init__(self) -> None:
        """Raises:
        ConfigError: the folder has a study of something else, or the storage cannot be opened.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with self.alone():
            self._storage = _opened(self.folder, self.url)
            self.study = self._open()
            self._check_same()

    def close(self) -> None:
        """Let go of the trial that this worker has, if any."""
        self._held.close()

    def run_folder(self, number: int) -> Path:
        """Where a trial is trained."""
        return self.folder / "trials" / f"{number:04d}"

    @property
    def number(self) -> int:
        """Of the trial that this worker has."""
        assert self._trial is not None
        return self._trial.number

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other worker takes a trial, ends one or writes what was found meanwhile."""
        with locked(self.folder / ".lock", _NO_LOCKS, wait=True):
            yield

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def claim(self) -> Claim | None:
        """Take a trial: one that a dead worker has left, else a new one; None where there is none to take."""
        with self.alone():
            trials = self.trials
            trial = self._left(trials) or self._new(trials)
            if trial is None:
                return None
            self._trial, self._spent = trial, trial.user_attrs.get("cpu_s", 0.0)
            starts = trial.user_attrs.get("starts", 0) + 1
            drawn = {
                each.name: _suggested(trial, each.name, each.distribution) for each in self.plan.parameters
            }
            trial.set_user_attr("starts", starts)
            return Claim(trial.number, drawn, starts, bool(trial.user_attrs.get("pruned")))

    def report(self, seen: Validation) -> bool:
        """Take a validation of this worker's trial into account; -> whether the trial is to end there."""
        assert self._trial is not None
        trial = self._trial
        # Now, since nobody knows of a worker that is killed what it has spent.
        trial.set_user_attr("cpu_s", self._spent + seen.cpu_s)
        known = self.trials[trial.number].intermediate_values
        if not math.isfinite(seen.value) or seen.step < max(known, default=-1):
            # A trial that was taken up repeats validations, on which others may have been judged since.
            return False
        if seen.step not in known:
            trial.report(seen.value, seen.step)
        pruned = not seen.last and trial.should_prune()
        if pruned:
            trial.set_user_attr("pruned", seen.step)
        return pruned

    def finish(self, outcome: Outcome) -> Outcome:
        """Write down what became of this worker's trial, and let go of it; -> with all of its starts."""
        assert self._trial is not None
        trial = self._trial
        with self.alone():
            steps = max(outcome.steps, steps_of(self.trials[trial.number]))
            whole = replace(outcome, steps=steps, cpu_s=self._spent + outcome.cpu_s)
            trial.set_user_attr("steps", whole.steps)
            trial.set_user_attr("cpu_s", whole.cpu_s)
            if outcome.reason:
                trial.set_user_attr("reason", outcome.reason)
            if outcome.state != "stopped":
                values = outcome.value if outcome.state == "complete" else None
                self.study.tell(trial, values, state=_STATES[outcome.state])
        self._trial = None
        self._held.close()
        return whole

    def _left(self, trials: list[FrozenTrial]) -> Trial | None:
        """A trial whose worker is dead."""
        for each in trials:
            if each.state == TrialState.RUNNING and self._take(each.number):
                self.study.sampler = sampler_of(self.plan.settings, each.number)
                study = self._storage.get_study_id_from_name(self.study.study_name)
                key = self._storage.get_trial_id_from_study_id_trial_number(study, each.number)
                return Trial(self.study, key)
        return None

    def _new(self, trials: list[FrozenTrial]) -> Trial | None:
        waiting = [each.number for each in trials if each.state == TrialState.WAITING]
        number = min(waiting, default=len(trials))
        if number >= self.plan.trials or not self._take(number):
            return None
        self.study.sampler = sampler_of(self.plan.settings, number)
        fixed = self.plan.fixed(number)
        if fixed and not waiting:
            self.study.enqueue_trial(fixed)
        return self.study.ask()

    def _take(self, number: int) -> bool:
        """Lock a trial for as long as this worker has it; -> whether it was free."""
        folder = self.run_folder(number)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._held.enter_context(locked(folder / ".taken", _NO_LOCKS))
        except BlockingIOError:
            return False
        return True

    def _open(self) -> optuna.Study:
        file = self.folder / "name"
        if not file.exists():
            # Other studies may be in a storage.
            write_text(file, f"{self.folder.absolute().name}-{os.urandom(4).hex()}")
        direction: Literal["minimize", "maximize"] = "minimize" if self.plan.lower_is_better else "maximize"
        try:
            return optuna.create_study(
                storage=self._storage,
                study_name=file.read_text(encoding="utf-8"),
                direction=direction,
                pruner=pruner_of(self.plan.settings, self.plan.base.train.validate_every),
                load_if_exists=True,
            )
        except (OSError, ImportError, ValueError) as error:
            raise ConfigError(f"{self.url or self.folder}: the study cannot be opened: {error}") from None

    def _check_same(self) -> None:
        """Raises ConfigError where the folder has a study of other things than this one."""
        # As JSON holds them.
        facts = json.loads(json.dumps(self.plan.facts))
        known = self.study.user_attrs.get("facts")
        if known is None:
            self.study.set_user_attr("log", self.plan.log)
            self.study.set_user_attr("facts", facts)
            return
        # What the first version of studies has said of a parameter.
        older = {f"parameters.{each.name}": f"{each.range} {each.keys}" for each in self.plan.parameters}
        same = {key for key, value in older.items() if known.get(key) == value}
        changed = [key for key in {**known, **facts} if known.get(key) != facts.get(key) and key not in same]
        if changed:
            shown = "; ".join(self._change(key, known.get(key), facts.get(key)) for key in changed[:3])
            more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ConfigError(
                f"{self.folder}: here is a study of something else ({shown}{more}); its trials and new ones "
                "could not be compared: give this one another --out"
            )

    def _change(self, key: str, before: Any, now: Any) -> str:
        """A fact that has changed, in a few words."""
        if key == "log":
            # The same place may have been written anew.
            was = self.study.user_attrs.get("log", "another one")
            return f"the log was {was} ({before[:_DIGITS]}), is {self.plan.log} ({now[:_DIGITS]})"
        keys = str(before)[str(before).rfind(_KEYS) :]
        if keys.startswith(_KEYS) and str(now).endswith(keys):
            before, now = (f"{str(each).removesuffix(keys)} }}" for each in (before, now))
        return f"{key} was {_absent(before)}, is {_absent(now)}"


def _absent(value: Any) -> Any:
    return "not there" if value is None else value


def steps_of(trial: FrozenTrial) -> int:
    """How far a trial has come, as far as the study knows."""
    return max(int(trial.user_attrs.get("steps", 0)), *trial.intermediate_values, 0)


def _suggested(trial: Trial, name: str, distribution: Any) -> Any:
    """What is drawn for a parameter, or was when the trial was taken before."""
    if isinstance(distribution, optuna.distributions.CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    low, high, step = distribution.low, distribution.high, distribution.step
    if isinstance(distribution, optuna.distributions.IntDistribution):
        return trial.suggest_int(name, low, high, step=step, log=distribution.log)
    return trial.suggest_float(name, low, high, step=step, log=distribution.log)


def _opened(folder: Path, url: str) -> BaseStorage:
    """A journal in the folder, or a database.

    Raises:
        ConfigError: the database cannot be opened.
    """
    if url:
        try:
            return RDBStorage(url)
        except Exception as error:
            # SQLAlchemy and the drivers each have their own kinds.
            text = " ".join(str(error).split())[:300]
            raise ConfigError(f"--storage {url}: {type(error).__name__}: {text}") from error
    # Optuna's other lock is a link to the journal, by a path that need not be the same on all machines.
    file = str(folder.absolute() / "journal.jsonl")
    lock = JournalFileOpenLock(file)
    lock.acquire()
    try:
        _mend(Path(file))
    finally:
        lock.release()
    return JournalStorage(JournalFileBackend(file, lock))


def _mend(journal: Path) -> None:
    """Cut off a last line that a crash left unfinished: what is appended to it could not be read."""
    with suppress(FileNotFoundError), journal.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
