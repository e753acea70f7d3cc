"""The training loop: data -> step -> metrics -> checkpoint, resumed from wherever the run stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict
from itertools import chain, islice, repeat
from typing import Any

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from embeddings.agreement import from_rank_0
from embeddings.lookup.before_change import RowsBeforeChange
from embeddings.lookup.touched import TouchedRows
from trainer.checkpoint import save_load as checkpoint
from trainer.checkpoint.background import Saver
from trainer.checkpoint.compatible import check_reshardable, check_same_order
from trainer.data.reader import Cursor, SequenceLogReader
from trainer.loop.averaging import Averaging
from trainer.loop.early_stopping import Best
from trainer.loop.fork import Fork, go_on, keeper_of
from trainer.loop.interrupts import Interrupts
from trainer.loop.meter import Meter
from trainer.loop.phases import Phase, phases_of, place_of_phase
from trainer.loop.pipeline import Pipeline, remark_on
from trainer.loop.position import Began, Position
from trainer.loop.progress import Progress
from trainer.loop.shares_plot import shares_plot
from trainer.loop.stage import Stage, Supply
from trainer.loop.validation import Validation
from trainer.quality.domains import SplitMetrics
from trainer.ranks.process_group import Ranks, naming_the_lost, sum_over_ranks
from trainer.run_config import Config
from trainer.run_folder import MetricsLog, RunFolder
from trainer.sealed_folder import write_text
from trainer.update.guard import Guard
from trainer.update.schedule import dense_schedule, run_steps, table_schedule
from trainer.update.step import TrainStep, run_optimizer


class Trainer:
    """One training run on one rank.

    Args:
        config: the run's config.
        model: the sharded model; its forward runs through DistributedModelParallel.
        train, validation: readers of the two splits, for this rank.
        ranks: this rank's place; folder: the run folder; say: prints a line on rank 0.
        log_fingerprint: kept with every checkpoint, see `compatible`; plan: the sharding plan in force.
        supply: what phases need; None for a run without phases.

    Attributes:
        stopped: training ended because it was asked to, before its end.
    """

    def __init__(
        self,
        config: Config,
        model: DistributedModelParallel,
        train: SequenceLogReader,
        validation: SequenceLogReader | None,
        ranks: Ranks,
        folder: RunFolder,
        say: Callable[[str], None],
        log_fingerprint: str,
        plan: dict[str, Any],
        supply: Supply | None = None,
    ) -> None:
        self.config, self.model, self.ranks, self.folder, self.say = config, model, ranks, folder, say
        self.log_fingerprint, self.plan = log_fingerprint, plan
        self.train_reader = train
        self.optimizer = run_optimizer(model, config)
        guard = Guard(ranks, folder.path)
        self.step = TrainStep(config, model, self.optimizer, ranks.world_size, guard)
        self.supply = supply if config.phases else None
        self.phases = phases_of(config, supply.domains if supply is not None else ())
        self.stage = Stage(self.phases, model, self.optimizer, self.step, config.train.seed, self.supply)
        self.validation = Validation(model, validation, ranks, folder.path, self.stage)
        self.pipeline = Pipeline(config.train.pipeline, model, self.step, ranks.device)
        self.averaging = Averaging(model, say)
        self._touched = TouchedRows(model) if config.checkpoint.full_every > 1 else None
        self._keeper: RowsBeforeChange | None = None
        self.fork: Fork | None = None
        self._take_up(self.phases[0], 0)
        if remark := remark_on(config.train.pipeline, self.pipeline):
            say(remark)
        self.at = Position()
        # Called with the number of steps done, after whatever else belongs to the step.
        self.after_step: Callable[[int], None] | None = None
        self.meter = Meter(ranks.device)
        self.saver = Saver(folder.checkpoints, config.checkpoint, say, ranks.local_world_size, self._touched)
        self.interrupts = Interrupts(config.checkpoint)
        self.stopped = False

    def run(self, start: checkpoint.ResumePoint) -> Position:
        """Train from a checkpoint, or the beginning, to the end or a stop signal; returns where it ended.

        Raises:
            DataError: a loss or gradient is not finite; no weight changes by that step, what was saved before
                stays, and nothing is saved after.
            CheckpointError: it could not be saved; older checkpoints stay.
            RankError: another rank, or the launcher, is gone or hangs.
        """
        with naming_the_lost(self.ranks, lambda: f"after step {self.at.step}"):
            self.resume(start)
            if start.path is None:
                self._enter(self.phases[0])
            if start.path is None or not self._finished():
                # Not before: a start that is refused, or has nothing to do, leaves the run as it is.
                from_rank_0(lambda: self.folder.write_config(self.config))
            # Validations after the newest save count, or the last line of metrics.jsonl would come twice.
            # Where the best one counts, all are done again that the newest save knows nothing of.
            sure = self.at.validated if self.phase.train.early_stopping.on else self.at.step
            known = from_rank_0(lambda: self.folder.drop_metrics_after(self.at.step, sure))
            self.at.validated = max(self.at.validated, known)
            log = MetricsLog(self.folder, self.at.step)
            with self.interrupts.listening(), self.saver, log as self.log:
                with Progress("train", self.ranks.speaks) as self.bar:
                    while not self._finished():
                        if self._phase_over():
                            self._next_phase()
                        self._epoch()
                if not self.stopped:
                    self._validate()
                    if self.validation.kept is not None and self._last_phase and self._phase_done():
                        self._back_to_best()
                # The step may be one of those after which a save was due.
                self.saver.settle()
                if self.saver.saved != self.at.step:
                    self._save(last=True)
                self.saver.settle(last=True)
        return self.at

    def _epoch(self) -> None:
        """Train what is left of an epoch; after each step report, validate, save and stop where it is due."""
        config = self.config.train
        self.meter = Meter(self.ranks.device)
        fork, over = self.fork, False
        ends = [end - self.at.step for end in self._ends] + ([fork.left(self.at)] if fork is not None else [])
        left = min(ends) if ends else None
        # Steps from one validation to the next, before which no step may be read ahead.
        stretches: Iterable[int | None] = [None]
        # The weights of a branch are validated where they are merged.
        every = 0 if fork is not None else config.validate_every
        if every and self.validation.reader is not None:
            stretches = chain([every - self.at.steps_done % every], repeat(every))
        with (
            closing(self.train_reader.steps(self.at.cursor)) as steps,
            # A pipeline reads ahead, but not beyond the last step.
            closing(self.pipeline.train(islice(steps, left), stretches)) as trained,
        ):
            self._set_rates()
            for step, tally in trained:
                self.at.step, self.at.cursor = self.at.step + 1, step.after
                self.at.candidates += step.batch.step_candidates
                self.averaging.after_step(self.at, step.last)
                self.meter.add(tally, step.batch.step_candidates)
                if self.at.step % config.log_every == 0:
                    self._report()
                if every and self.at.steps_done % every == 0:
                    self._validate()
                if over := fork is not None and fork.over(self.at, step.last):
                    break
                self._between_steps(step.last and self.at.passes_done(self.phase, 1) and self._last_phase)
                if self._stops_here():
                    break
                self._set_rates()
        self._report()
        if over and fork is not None:
            self._turn(fork, step.last)
        elif not self._stops_here():
            self.at.cursor = Cursor(self.at.cursor.epoch + 1)

    def _turn(self, fork: Fork, last: bool) -> None:
        """End a branch, and merge all after the last one; see `Fork.turn`."""
        merge = fork.turn(self.at, last)
        self._train_as(fork.branch)
        if merge is not None:
            self.validation.newest, self.at.validated = merge.metrics, self.at.step
            self.log.write(self.at.step, "merge", {**self._of_phase(), **merge.entry()})
            self.log.write(self.at.step, "validation", {**self._of_phase(), **merge.metrics.entry()})
            from_rank_0(lambda: write_text(self.folder.shares, shares_plot(fork.names, fork.round.history)))
            self.say(merge.text(self.at.step))
        # Time that no step has taken.
        self.meter.take_time()
        self._between_steps(self._last_phase and self._phase_over())

    def _set_rates(self) -> None:
        """Set the learning rates of the next step."""
        self.stage.set_rates(*self._rate_factors())

    def _rate_factors(self) -> tuple[float, float]:
        """Of dense weights and of tables, see `trainer.update.schedule`."""
        step, progress = self.at.steps_done, self._progress()
        dense, tables = (schedule.factor(step, progress) for schedule in self.schedules)
        return dense, tables

    def _between_steps(self, last: bool) -> None:
        """Save where one is due, and see whether to stop; on every rank alike.

        After the last step nothing is saved before the last validation, which the checkpoint is to know of.
        """
        interrupt = self.interrupts.look(self.at.step, self.saver.failed)
        self.stopped = interrupt.stop
        if interrupt.save_failed:
            self.saver.settle()
        every = self.config.checkpoint.every_steps
        # One that stops is saved by run(), which waits for it.
        due = interrupt.save_due or self.validation.due or bool(every and self.at.step % every == 0)
        if due and not (last or (self._stops_here() and (self._last_phase or self._run_over()))):
            self._save()
        self.ranks.check_launcher()
        if self.after_step is not None:
            self.after_step(self.at.step)

    def _enter(self, phase: Phase) -> None:
        """Begin a phase, and train as it says."""
        if phase.name:
            self.say(phase.line(len(self.phases)))
        for line in self.stage.enter(phase):
            # Rows have changed that no step has looked up, so that no delta may build on what was saved.
            self.saver.follow(None)
            self.say(f"phase {phase.name}: {line}")
        self._take_up(phase, self.at.began.epoch)
        if self.fork is not None:
            self.fork.begin(self.at)
        if self.validation.lacks:
            self.say(f"phase {phase.name}: {self.validation.lacks}")
        if self.validation.kept is not None:
            # What the phase begins with may be better than all that comes of it.
            self.validation.judge(self.at, phase, self.validation.measure(self.pipeline))

    def _take_up(self, phase: Phase, first_epoch: int) -> None:
        """Train as a phase says that began in this epoch, from wherever in it."""
        if self.fork is not None:
            self.fork.end()
        self.phase, self.fork = phase, self._fork_of(phase)
        # What a domain reads by itself does not depend on the passes of others.
        self._train_as(phase, 0 if phase.each is None else first_epoch)
        self._order = self.train_reader.order
        if self.fork is not None:
            self._train_as(self.fork.branch)
        self._pass_candidates = self.train_reader.candidates
        steps = run_steps(phase.train, self._pass_candidates, self.config.data.batch_candidates)
        self.schedules = dense_schedule(phase.train, steps), table_schedule(phase.train, steps)
        self.averaging.begin(phase)
        self.validation.follow(phase)

    def _train_as(self, phase: Phase, first_epoch: int = 0) -> None:
        """Read and train as a phase, or a branch of it, says."""
        if self.supply is not None:
            self.train_reader = self.supply.reader(phase, first_epoch)
        if self.stage.take_up(phase):
            self.pipeline = Pipeline(self.config.train.pipeline, self.model, self.step, self.ranks.device)

    def _fork_of(self, phase: Phase) -> Fork | None:
        """The branches of a phase, if it has any."""
        if phase.settings.fork is None:
            return None
        self._keeper = self._keeper or keeper_of(self.model, self._tensors())

        def measure() -> SplitMetrics:
            return self.validation.measure(self.pipeline)

        return Fork(phase, self._tensors, self._keeper, self._touched, measure)

    def _next_phase(self) -> None:
        """Measure where a phase has ended, go back to its best weights if it looked for them, and go on."""
        self._validate()
        self._back_to_best()
        phase = self.phases[self.phase.number + 1]
        self.at.begin(phase, self.phase)
        self._enter(phase)

    def _back_to_best(self) -> None:
        """Take up the best weights of the phase, if there are better ones than the present."""
        best, kept = self.at.best, self.validation.kept
        if best.step in (-1, self.at.step):
            return
        if kept is not None:
            kept.restore()
            self.validation.newest = self.validation.best
        else:
            self._load_best(best.step)
        self.say(f"phase {self.phase.name} ends with its best weights, of step {best.step:,}")

    @property
    def _last_phase(self) -> bool:
        return self.phase.number + 1 == len(self.phases)

    def _finished(self) -> bool:
        """Whether no step is left."""
        return self._run_over() or (self._last_phase and self._phase_over())

    def _run_over(self) -> bool:
        """Whether training ends here, whatever is left of its phases."""
        limit = self.config.train.max_steps
        return self.stopped or bool(limit and self.at.step >= limit)

    def _phase_over(self) -> bool:
        return self._phase_done() or self._run_over()

    def _phase_done(self) -> bool:
        """Whether the phase has come to its own end."""
        inside = self.fork is not None and self.fork.inside(self.at)
        return not inside and self.at.phase_done(self.phase)

    def _stops_here(self) -> bool:
        """Whether the phase ends after the step that was just done, wherever its data stand."""
        return self._run_over() or self.ended_early or any(self.at.step >= end for end in self._ends)

    @property
    def _ends(self) -> list[int]:
        return self.at.ends(self.phase, self.config.train.max_steps)

    @property
    def ended_early(self) -> bool:
        """Whether validation has brought nothing for as long as the config waits."""
        return self.at.best.over(self.phase.train.early_stopping)

    def _report(self) -> None:
        """Write what was trained since the last report; collective."""
        meter = self.meter
        if meter.candidates == 0:
            return
        self.pipeline.settle()
        wall, cpu = meter.take_time()
        self.at.wall_s, self.at.cpu_s = self.at.wall_s + wall, self.at.cpu_s + cpu
        losses = self.step.losses.report(*meter.sums(), meter.candidates)
        rate = meter.candidates / max(wall, 1e-9)
        dense, tables = self._rate_factors()
        speed = {"samples": self.at.candidates, "samples_per_s": rate}
        rates = {"rate_factor": dense, "table_rate_factor": tables}
        of = {**self._of_phase(), **(self.fork.of_branch() if self.fork is not None else {})}
        entry = {**of, **losses, **speed, **rates, **self.step.report()}
        self.log.write(self.at.step, "train", entry)
        text = f"step {self.at.step}  loss {losses['loss']:.4f}  {rate:,.0f} samples/s"
        # Phases are taken for equally long, since nobody knows how long those are that end early.
        share = (self.phase.number + self._progress()) / len(self.phases)
        self.bar.show(share, text, last=share >= 1)
        meter.restart()

    def _validate(self) -> None:
        if self.validation.reader is None or self.at.validated == self.at.step:
            return
        metrics = self.validation.newest = self.validation.measure(self.pipeline)
        self.at.validated = self.at.step
        self.log.write(self.at.step, "validation", {**self._of_phase(), **metrics.entry()})
        sampled = "" if metrics.sampled is None else " ({:,} of {:,} candidates)".format(*metrics.sampled)
        self.say(f"validation after step {self.at.step}{sampled}:{metrics.text()}")
        if line := self.validation.judge(self.at, self.phase, metrics):
            self.say(line)
        # Time that no step has taken.
        self.meter.take_time()

    def kept_validation(self) -> tuple[SplitMetrics | None, int]:
        """Metrics of the checkpoint that `evaluate` and `export` take, and its step; collective.

        Where that is the best one, and an earlier start has measured it, its weights are loaded and stay.
        """
        self.validation.of_all()
        best = Best() if self.validation.kept is not None else self.at.best
        if self.validation.reader is None:
            return None, self.at.step
        if best.step in (-1, self.at.step):
            # An earlier start may have measured it.
            return self.validation.newest or self.validation.measure(self.pipeline), self.at.step
        if self.validation.best is None:
            step = self._load_best()
            return self.validation.measure(self.pipeline), step
        return self.validation.best, best.step

    def _load_best(self, step: int | None = None) -> int:
        """Take up the weights of the best checkpoint, or of that of a step; -> its step."""
        self.saver.settle()
        found = checkpoint.find_to_use(self.folder.checkpoints, "" if step is None else str(step))
        for line in found.lines:
            self.say(line)
        path = found.path
        assert path is not None
        self.load(lambda tensors: checkpoint.load_tensors(path, tensors))
        return int(found.state["step"])

    def _of_phase(self) -> dict[str, str]:
        """What lines of metrics say of the phase."""
        return {"phase": self.phase.name} if self.phase.name else {}

    def _progress(self) -> float:
        return self.at.progress(self.phase, self._pass_candidates)

    def cpu_seconds(self) -> float:
        """CPU seconds of the training steps of all ranks; collective."""
        mine = torch.tensor(self.at.cpu_s, dtype=torch.float64, device=self.ranks.device)
        return float(sum_over_ranks(mine))

    def load(self, fill: Callable[[dict[str, Any]], None]) -> None:
        """Have `fill` write into the tensors of model and optimizer, and take them up."""
        tensors = self._tensors()
        fill(tensors)
        self.saver.follow(None)
        self.model.load_state_dict(tensors["model"])
        self.optimizer.load_state_dict(tensors["optim"])

    def _tensors(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optim": self.optimizer.state_dict()}

    def _save(self, last: bool = False) -> None:
        self.pipeline.settle()
        self._report()
        self.validation.due = False
        state = {
            **asdict(self.at),
            "phase_name": self.phase.name,
            "cpu_s": self.cpu_seconds(),
            "world_size": self.ranks.world_size,
            "log": self.log_fingerprint,
            "plan": self.plan,
            "order": self._order,
            **self.validation.state(self.at.best),
            "config": self.config.model_dump(mode="json"),
            **self.averaging.state(),
        }
        beside = None
        if self.fork is not None:
            state["fork"], beside = self.fork.state(), self.fork.files(self.at)
        from_rank_0(lambda: self.log.keep(self.config.checkpoint.on_error == "continue"))
        tensors = {**self._tensors(), **self.averaging.tensors(), **self.validation.tensors()}
        best = state["best"]["step"]
        self.saver.save(self.at.step, tensors, state, best=best, last=last, beside=beside)
        self.interrupts.restart_clock()
        # Time that no step has taken.
        self.meter.take_time()

    def resume(self, start: checkpoint.ResumePoint) -> None:
        """Continue from a verified checkpoint, if there is one.

        Raises:
            ConfigError: it stands inside an epoch, and the log's rows lie in another order since.
            CheckpointError: the tables' optimizer state has no meaning for how they lie now.
        """
        path, state = start.path, start.state
        if path is None:
            return
        phase = self.phases[place_of_phase(self.phases, state, path.name)]
        self._take_up(phase, Began(**state.get("began", {})).epoch)
        check_reshardable(path, state, self.plan)
        check_same_order(path, state, self._order, self.config.data.log)
        go_on(self.fork, state, path.name)
        self.load(lambda tensors: checkpoint.load_tensors(path, tensors))
        self.averaging.resume(path, state)
        best, why = self.validation.resume(path, state, phase, self.train_reader.columns.tasks)
        if why:
            self.say(why)
        self.at = Position.of_state(state, self.ranks.world_size, best)
        self.saver.saved = self.step.number = self.at.step
        self.saver.refused = set(start.refused_names)
        self.saver.follow(path, state.get("base", {}).get("links", 0))
        if self.fork is not None:
            self._train_as(self.fork.branch)
            self.fork.resume(path, self.at)
        self.say(f"resumed from {path}")
