"""The phases of a run, one of which is under way: what is read, trained, averaged and measured in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from embeddings.ids.new_rows import NewRows
from embeddings.lookup.before_change import RowsBeforeChange
from embeddings.lookup.touched import TouchedRows
from trainer.checkpoint.delta import rows_of_tables
from trainer.data.reader import SequenceLogReader
from trainer.loop.averaging import Averaging
from trainer.loop.fork import Fork, keeper_of
from trainer.loop.living import LivingIds
from trainer.loop.phases import Phase, phases_of
from trainer.loop.pipeline import Pipeline, kind_for
from trainer.loop.position import Position
from trainer.loop.stage import Stage, Supply
from trainer.loop.validation import Validation
from trainer.quality.domains import SplitMetrics
from trainer.ranks.process_group import Ranks
from trainer.run_config import Config
from trainer.update.schedule import dense_schedule, run_steps, table_schedule
from trainer.update.step import TrainStep


class Course:
    """Brings a run from phase to phase.

    Args:
        config: of the run; model: sharded; optimizer, step: that train it.
        train, validation: readers of the two splits; ranks: this rank's place; folder: for scores that do not
            fit into memory; say: prints a line on rank 0.
        supply: what phases need; None for a run without phases.
        touched: told of rows that no step has changed, where there are incremental checkpoints.

    Attributes:
        phases: of the run; phase: the present one; fork: its branches, or None.
        reader: of what is trained now; order: digest of what the phase reads, see `SequenceLogReader`.
        stage, validation, averaging, pipeline: as the present phase has them.
        living: the id stage, or None where no feature's ids come and go.
    """

    def __init__(
        self,
        config: Config,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        step: TrainStep,
        train: SequenceLogReader,
        validation: SequenceLogReader | None,
        ranks: Ranks,
        folder: Path,
        say: Callable[[str], None],
        supply: Supply | None,
        touched: TouchedRows | None,
    ) -> None:
        ahead = kind_for(config.train.pipeline, ranks.device) != "none"
        self.living: LivingIds | None = None
        if config.ids:
            self.living = LivingIds.of(config, ranks, ahead, train.columns.features)
        self._config, self._model, self._optimizer, self._step = config, model, optimizer, step
        self._ranks, self._say, self._touched = ranks, say, touched
        self.supply, self.reader = supply if config.phases else None, train
        self.phases = phases_of(config, supply.domains if supply is not None else ())
        self.stage = Stage(self.phases, model, optimizer, step, config.train.seed, self.supply)
        self.validation = Validation(model, validation, ranks, folder, self.stage, self.living)
        self.pipeline = Pipeline(config.train.pipeline, model, step, ranks.device)
        self.averaging = Averaging(model, say)
        self.fork: Fork | None = None
        self._keeper: RowsBeforeChange | None = None
        if self.living is not None:
            groups, parts = model.module.lookups.groups.values(), rows_of_tables(self.tensors())
            step.new_rows = NewRows(groups, config.train.seed, parts, touched)
        self.take_up(self.phases[0], 0)

    def begin(self, phase: Phase, at: Position) -> bool:
        """Do what a phase begins with, and train as it says; -> whether rows may have changed by that."""
        if phase.name:
            self._say(phase.line(len(self.phases)))
        lines = self.stage.enter(phase)
        for line in lines:
            self._say(f"phase {phase.name}: {line}")
        self.take_up(phase, at.began.epoch)
        if self.fork is not None:
            self.fork.begin(at)
        if self.validation.lacks:
            self._say(f"phase {phase.name}: {self.validation.lacks}")
        if self.validation.kept is not None:
            # What the phase begins with may be better than all that comes of it.
            metrics = self.validation.measure(self.pipeline)
            self._say(f"phase {phase.name} begins at:{metrics.text()}")
            self.validation.judge(at, phase, metrics)
        return bool(lines)

    def take_up(self, phase: Phase, first_epoch: int) -> None:
        """Train as a phase says that began in this epoch, from wherever in it."""
        if self.fork is not None:
            self.fork.end()
        self.phase, self.fork = phase, self._fork_of(phase)
        # What a domain reads by itself does not depend on the passes of others.
        self.train_as(phase, 0 if phase.each is None else first_epoch)
        self.order = self.reader.order
        if self.fork is not None:
            self.train_as(self.fork.branch)
        self._pass_candidates = self.reader.candidates
        steps = run_steps(phase.train, self._pass_candidates, self._config.data.batch_candidates)
        self._schedules = dense_schedule(phase.train, steps), table_schedule(phase.train, steps)
        self.averaging.begin(phase)
        self.validation.follow(phase)

    def train_as(self, phase: Phase, first_epoch: int = 0) -> None:
        """Read and train as a phase, or a branch of it, says."""
        if self.supply is not None:
            self.reader = self.supply.reader(phase, first_epoch)
        if self.stage.take_up(phase):
            kind = self._config.train.pipeline
            self.pipeline = Pipeline(kind, self._model, self._step, self._ranks.device)
        if self.living is not None:
            self.living.frozen = not self.stage.moves_tables

    def _fork_of(self, phase: Phase) -> Fork | None:
        """The branches of a phase, if it has any."""
        if phase.settings.fork is None:
            return None
        self._keeper = self._keeper or keeper_of(self._model, self.tensors())

        def measure() -> SplitMetrics:
            return self.validation.measure(self.pipeline)

        return Fork(phase, self.tensors, self._keeper, self._touched, measure)

    @property
    def last(self) -> bool:
        """Whether no phase comes after the present one."""
        return self.phase.number + 1 == len(self.phases)

    def done(self, at: Position) -> bool:
        """Whether the phase has come to its own end."""
        inside = self.fork is not None and self.fork.inside(at)
        return not inside and at.phase_done(self.phase)

    def progress(self, at: Position) -> float:
        """Share of the phase that is done."""
        return at.progress(self.phase, self._pass_candidates)

    def share(self, at: Position) -> float:
        """About the share of the run that is done, by the steps of its phases and of their branches."""
        before, now = sum(self._lengths[: self.phase.number]), self._lengths[self.phase.number]
        done = self.progress(at)
        if self.fork is not None:
            done = min(1.0, (at.step - at.began.step) / now)
        return (before + done * now) / sum(self._lengths)

    @cached_property
    def _lengths(self) -> list[int]:
        """About how many steps each phase has, over all of its branches."""
        lengths = []
        for phase in self.phases:
            reader = self.reader if self.supply is None else self.supply.reader(phase, 0)
            steps = run_steps(phase.train, reader.candidates, self._config.data.batch_candidates)
            fork = phase.settings.fork
            lengths.append(max(1, steps) * (1 if fork is None else len(fork.branches)))
        return lengths

    def cut_short(self, at: Position) -> str:
        """A line where `train.max_steps` ended the run before its phases did; else empty."""
        limit = self._config.train.max_steps
        if not self.phase.name or not limit or at.step < limit or (self.last and self.done(at)):
            return ""
        left = [phase.name for phase in self.phases[self.phase.number + 1 :]]
        more = f"; {', '.join(left)} did not begin" if left else ""
        return f"train.max_steps = {limit} ended the run inside {self.phase.name}{more}"

    def rate_factors(self, at: Position) -> tuple[float, float]:
        """Of dense weights and of tables in the next step, see `trainer.update.schedule`."""
        step, progress = at.steps_done, self.progress(at)
        dense, tables = (schedule.factor(step, progress) for schedule in self._schedules)
        return dense, tables

    def told(self, *, branch: bool = False) -> dict[str, Any]:
        """What lines of metrics say of the phase, and of its branch."""
        of_branch = self.fork.of_branch() if branch and self.fork is not None else {}
        return {**({"phase": self.phase.name} if self.phase.name else {}), **of_branch}

    def tensors(self) -> dict[str, Any]:
        """The state dicts of the model and of its optimizers."""
        return {"model": self._model.state_dict(), "optim": self._optimizer.state_dict()}

    def take_tensors(self, tensors: Mapping[str, Any]) -> None:
        """Take up what was written into them."""
        self._model.load_state_dict(tensors["model"])
        self._optimizer.load_state_dict(tensors["optim"])
