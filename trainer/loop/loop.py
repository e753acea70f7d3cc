"""The training loop: data -> step -> metrics -> checkpoint, resumed from wherever the run stands."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext
from dataclasses import asdict
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from embeddings.agreement import from_rank_0
from embeddings.errors import CheckpointError
from embeddings.lookup.touched import TouchedRows
from trainer.checkpoint import save_load as checkpoint
from trainer.checkpoint.background import Saver
from trainer.data.reader import SequenceLogReader
from trainer.loop.course import Course
from trainer.loop.early_stopping import Best
from trainer.loop.fork import Fork
from trainer.loop.interrupts import Interrupts
from trainer.loop.meter import Meter
from trainer.loop.phases import Phase
from trainer.loop.pipeline import remark_on
from trainer.loop.position import Position
from trainer.loop.progress import Progress
from trainer.loop.resuming import take_up
from trainer.loop.shares_plot import shares_plot
from trainer.loop.stage import Supply
from trainer.quality.domains import SplitMetrics
from trainer.ranks.process_group import Ranks, naming_the_lost, sum_over_ranks
from trainer.run_config import Config
from trainer.run_folder import MetricsLog, RunFolder
from trainer.sealed_folder import write_text
from trainer.update.guard import Guard
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
        pruned: the same by `after_validation`; nobody goes on with it, and so it is not saved.
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
        self.optimizer = run_optimizer(model, config)
        self.step = TrainStep(config, model, self.optimizer, ranks.world_size, Guard(ranks, folder.path))
        touched = TouchedRows(model) if config.checkpoint.full_every > 1 else None
        given = config, model, self.optimizer, self.step
        self.course = Course(*given, train, validation, ranks, folder.path, say, supply, touched)
        self.validation, self.living = self.course.validation, self.course.living
        if remark := remark_on(config.train.pipeline, self.course.pipeline):
            say(remark)
        self.at = Position()
        # Called with the number of steps done, after whatever else belongs to the step.
        self.after_step: Callable[[int], None] | None = None
        # After each validation, with what was measured and whether it is the last; -> whether to prune here.
        self.after_validation: Callable[[int, SplitMetrics, bool], bool] | None = None
        self.meter = Meter(ranks.device)
        self.saver = Saver(folder.checkpoints, config.checkpoint, say, ranks.local_world_size, touched)
        self.interrupts = Interrupts(config.checkpoint)
        self.stopped = self.pruned = False

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
                self._begin(self.course.phases[0])
            if start.path is None or not self._finished():
                # Not before: a start that is refused, or has nothing to do, leaves the run as it is.
                from_rank_0(lambda: self.folder.write_config(self.config))
            # Validations after the newest save count, or the last line of metrics.jsonl would come twice.
            # Where the best one counts, all are done again that the newest save knows nothing of.
            sure = self._measured_for_sure()
            known = from_rank_0(lambda: self.folder.drop_metrics_after(self.at.step, sure))
            self.at.validated = max(self.at.validated, known)
            log = MetricsLog(self.folder, self.at.step)
            with self.interrupts.listening(), self.saver, log as self.log:
                with Progress("train", self.ranks.speaks) as self.bar:
                    self._train()
                if not self.stopped:
                    self._validate()
                if self.validation.kept is not None and self.course.last and self.course.done(self.at):
                    # Also where a stop was asked for after the last step: what is saved stays.
                    self._back_to_best()
                # The step may be one of those after which a save was due.
                self.saver.settle()
                if self.saver.saved != self.at.step and not self.pruned:
                    self._save(last=True)
                self.saver.settle(last=True)
        return self.at

    def _measured_for_sure(self) -> int:
        """The step up to which no validation is done again."""
        return self.at.validated if self.course.phase.train.early_stopping.on else self.at.step

    def _train(self) -> None:
        """Train to the end, or to a stop signal."""
        while not self._finished():
            if self._phase_over():
                self._next_phase()
            self._epoch()

    def _epoch(self) -> None:
        """Train what is left of an epoch; after each step report, validate, save and stop where it is due."""
        config = self.config.train
        self.meter = Meter(self.ranks.device)
        fork, over, passed = self.course.fork, False, False
        ends = [end - self.at.step for end in self._ends] + ([fork.left(self.at)] if fork is not None else [])
        left = min(ends) if ends else None
        # Steps from one validation to the next, before which no step may be read ahead.
        stretches: Iterable[int | None] = [None]
        # The weights of a branch are validated where they are merged.
        every = 0 if fork is not None else config.validate_every
        if every and self.validation.reader is not None:
            stretches = chain([every - self.at.steps_done % every], repeat(every))
        with (
            closing(self.course.reader.steps(self.at.cursor)) as read,
            nullcontext(read) if self.living is None else self.living.steps(read) as steps,
            # A pipeline reads ahead, but not beyond the last step.
            closing(self.course.pipeline.train(islice(steps, left), stretches)) as trained,
        ):
            self._set_rates()
            for step, tally in trained:
                if self.living is not None:
                    self.living.trained()
                self.at.step, self.at.cursor = self.at.step + 1, step.after
                self.at.candidates, passed = self.at.candidates + step.batch.step_candidates, step.last
                self.course.averaging.after_step(self.at, step.last)
                self.meter.add(tally, step.batch.step_candidates)
                if self.at.step % config.log_every == 0:
                    self._report()
                if every and self.at.steps_done % every == 0:
                    self._validate()
                if over := fork is not None and fork.over(self.at, step.last):
                    break
                self._between_steps(
                    step.last and self.at.passes_done(self.course.phase, 1) and self.course.last
                )
                if self._stops_here():
                    break
                self._set_rates()
        self._report()
        if over and fork is not None:
            self._turn(fork, step.last)
        elif passed or not self._stops_here():
            self.at.cursor = self.at.cursor.next_pass()

    def _turn(self, fork: Fork, last: bool) -> None:
        """End a branch, and merge all after the last one; see `Fork.turn`."""
        merge = fork.turn(self.at, last)
        self.course.train_as(fork.branch)
        if merge is not None:
            self.validation.newest, self.at.validated = merge.metrics, self.at.step
            self.log.write(self.at.step, "merge", {**self.course.told(), **merge.entry()})
            self.log.write(self.at.step, "validation", {**self.course.told(), **merge.metrics.entry()})
            from_rank_0(lambda: write_text(self.folder.shares, shares_plot(fork.names, fork.round.history)))
            self.say(merge.text(self.at.step))
        # Time that no step has taken.
        self.meter.take_time()
        self._between_steps(self.course.last and self._phase_over())

    def _set_rates(self) -> None:
        """Set the learning rates of the next step."""
        self.course.stage.set_rates(*self.course.rate_factors(self.at))

    def _between_steps(self, last: bool) -> None:
        """Save where one is due, and see whether to stop; on every rank alike.

        After the last step nothing is saved before the last validation, which the checkpoint is to know of.
        """
        interrupt = self.interrupts.look(self.at.step, self.saver.failed)
        self.stopped = self.stopped or interrupt.stop
        if interrupt.save_failed:
            self.saver.settle()
        every = self.config.checkpoint.every_steps
        # One that stops is saved by run(), which waits for it.
        due = interrupt.save_due or self.validation.due or bool(every and self.at.step % every == 0)
        if due and not (last or (self._stops_here() and (self.course.last or self._run_over()))):
            self._save()
        self.ranks.check_launcher()
        if self.after_step is not None:
            self.after_step(self.at.step)

    def _begin(self, phase: Phase) -> None:
        """Begin a phase."""
        if self.course.begin(phase, self.at):
            # Rows that no step has looked up: no delta may build on what was saved.
            self.saver.follow(None)

    def _next_phase(self) -> None:
        """Measure where a phase has ended, go back to its best weights if it looked for them, and go on."""
        self._validate()
        self._back_to_best()
        before = self.course.phase
        phase = self.course.phases[before.number + 1]
        self.at.begin(phase, before)
        self._begin(phase)

    def _back_to_best(self) -> None:
        """Take up the best weights of the phase, if there are better ones than the present."""
        best, kept = self.at.best, self.validation.kept
        if best.step in (-1, self.at.step):
            return
        if kept is not None:
            kept.restore()
            self.validation.newest = self.validation.best
        else:
            try:
                self._load_best(best.step)
            except CheckpointError as error:
                if self.config.checkpoint.on_error == "stop":
                    raise
                lost = f"its best weights, of step {best.step:,}, were not saved"
                self.say(f"phase {self.course.phase.name} ends with its last weights; {lost} ({error})")
                return
        self.say(f"phase {self.course.phase.name} ends with its best weights, of step {best.step:,}")

    def _finished(self) -> bool:
        """Whether no step is left."""
        return self._run_over() or (self.course.last and self._phase_over())

    def _run_over(self) -> bool:
        """Whether training ends here, whatever is left of its phases."""
        return self.stopped or self.pruned or 0 < self.config.train.max_steps <= self.at.step

    def _phase_over(self) -> bool:
        return self.course.done(self.at) or self._run_over()

    def _stops_here(self) -> bool:
        """Whether the phase ends after the step that was just done, wherever its data stand."""
        return self._run_over() or self.ended_early or any(self.at.step >= end for end in self._ends)

    @property
    def _ends(self) -> list[int]:
        return self.at.ends(self.course.phase, self.config.train.max_steps)

    @property
    def ended_early(self) -> bool:
        """Whether validation has brought nothing for as long as the config waits."""
        return self.at.best.over(self.course.phase.train.early_stopping)

    def _report(self) -> None:
        """Write what was trained since the last report; collective."""
        meter = self.meter
        if meter.candidates == 0:
            return
        self.course.pipeline.settle()
        wall, cpu = meter.take_time()
        self.at.wall_s, self.at.cpu_s = self.at.wall_s + wall, self.at.cpu_s + cpu
        losses = self.step.losses.report(*meter.sums(), meter.candidates)
        rate = meter.candidates / max(wall, 1e-9)
        dense, tables = self.course.rate_factors(self.at)
        speed = {"samples": self.at.candidates, "samples_per_s": rate}
        rates = {"rate_factor": dense, "table_rate_factor": tables}
        entry = {**self.course.told(branch=True), **losses, **speed, **rates, **self.step.report()}
        if self.living is not None:
            entry |= {f"ids.{name}": each for name, each in self.living.report().items()}
        self.log.write(self.at.step, "train", entry)
        text = f"step {self.at.step}  loss {losses['loss']:.4f}  {rate:,.0f} samples/s"
        if self.course.fork is not None:
            text = f"{self.course.fork.of_branch()['branch']}: {text}"
        share = self.course.share(self.at)
        self.bar.show(share, text, last=share >= 1)
        meter.restart()

    def _validate(self) -> None:
        if self.validation.reader is None or self.at.validated == self.at.step:
            return
        metrics = self.validation.newest = self.validation.measure(self.course.pipeline)
        self.at.validated = self.at.step
        self.log.write(self.at.step, "validation", {**self.course.told(), **metrics.entry()})
        sampled = "" if metrics.sampled is None else " ({:,} of {:,} candidates)".format(*metrics.sampled)
        self.say(f"validation after step {self.at.step}{sampled}:{metrics.text()}")
        if line := self.validation.judge(self.at, self.course.phase, metrics):
            self.say(line)
        if self.after_validation is not None:
            self.pruned = self.after_validation(self.at.step, metrics, self.course.share(self.at) >= 1)
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
            return self.validation.newest or self.validation.measure(self.course.pipeline), self.at.step
        if self.validation.best is None:
            step = self._load_best()
            return self.validation.measure(self.course.pipeline), step
        return self.validation.best, best.step

    def _load_best(self, step: int | None = None) -> int:
        """Take up the weights of the best checkpoint, or of that of a step; -> its step."""
        self.saver.settle()
        found = checkpoint.find_to_use(self.folder.checkpoints, "" if step is None else str(step))
        for line in found.lines:
            self.say(line)
        assert found.path is not None
        self.load_from(found.path)
        return int(found.state["step"])

    def load_from(self, path: Path) -> None:
        """Take up the weights of a verified checkpoint, and its maps of ids."""
        self.load(lambda tensors: checkpoint.load_tensors(path, tensors))
        if self.living is not None:
            for line in self.living.load(path):
                self.say(line)

    def cpu_seconds(self) -> float:
        """CPU seconds of the training steps of all ranks; collective."""
        mine = torch.tensor(self.at.cpu_s, dtype=torch.float64, device=self.ranks.device)
        return float(sum_over_ranks(mine))

    def load(self, fill: Callable[[dict[str, Any]], None]) -> None:
        """Have `fill` write into the tensors of model and optimizer, and take them up."""
        tensors = self.course.tensors()
        fill(tensors)
        self.saver.follow(None)
        self.course.take_tensors(tensors)

    def _save(self, last: bool = False) -> None:
        self.course.pipeline.settle()
        self._report()
        self.validation.due = False
        vectors = {name: each.digest for name, each in self.course.reader.vectors.items()}
        state = {
            **asdict(self.at),
            "phase_name": self.course.phase.name,
            "cpu_s": self.cpu_seconds(),
            "world_size": self.ranks.world_size,
            "log": self.log_fingerprint,
            "plan": self.plan,
            "order": self.course.order,
            **self.validation.state(self.at.best),
            "config": self.config.model_dump(mode="json"),
            **self.course.averaging.state(),
            **({"vectors": vectors} if vectors else {}),
            **self._more_state(),
        }
        besides: list[checkpoint.Beside] = [] if self.living is None else [self.living.files().write]
        if self.course.fork is not None:
            state["fork"] = self.course.fork.state()
            besides += self.course.fork.files(self.at)
        from_rank_0(lambda: self.log.keep(self.config.checkpoint.on_error == "continue"))
        tensors = {**self.course.tensors(), **self.course.averaging.tensors(), **self.validation.tensors()}
        self.saver.save(self.at.step, tensors, state, best=state["best"]["step"], last=last, besides=besides)
        self.interrupts.restart_clock()
        # Time that no step has taken.
        self.meter.take_time()

    def _more_state(self) -> dict[str, Any]:
        """What a checkpoint of this kind of training keeps besides; called before each save."""
        return {}

    def resume(self, start: checkpoint.ResumePoint) -> None:
        """Continue from a verified checkpoint, if there is one; see `take_up` for the errors."""
        if start.path is not None:
            take_up(self, start.path, start)
