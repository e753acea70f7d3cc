"""The training loop: data -> step -> metrics -> checkpoint, resumed from wherever the run stands."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import chain, islice, repeat
from typing import Any

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from embeddings.agreement import from_rank_0
from embeddings.lookup.touched import TouchedRows
from trainer.checkpoint import save_load as checkpoint
from trainer.checkpoint.background import Saver
from trainer.checkpoint.compatible import check_reshardable, check_same_order
from trainer.data.reader import Cursor, SequenceLogReader
from trainer.loop.early_stopping import Best, changed_watch, watched
from trainer.loop.interrupts import Interrupts
from trainer.loop.pipeline import Pipeline, remark_on
from trainer.loop.progress import Progress
from trainer.objectives.step_loss import Tally
from trainer.quality.domains import SplitMetrics
from trainer.quality.evaluate import scored_split, shared_metrics
from trainer.ranks.process_group import Ranks, naming_the_lost, sum_over_ranks
from trainer.run_config import Config
from trainer.run_folder import MetricsLog, RunFolder
from trainer.update.guard import Guard
from trainer.update.schedule import dense_schedule, progress_of, run_steps, table_schedule
from trainer.update.step import RateSetter, TrainStep, run_optimizer


@dataclass
class Position:
    """Where training stands: what a checkpoint keeps besides tensors.

    Attributes:
        step: steps done; cursor: next block to read; candidates: trained so far, over all ranks.
        wall_s, cpu_s: spent in training steps so far, by this rank (checkpoints keep cpu_s of all ranks).
        validated: step of the newest validation, -1 before the first; best: see `early_stopping`.
    """

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    candidates: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    validated: int = -1
    best: Best = field(default_factory=Best)


class Trainer:
    """One training run on one rank.

    Args:
        config: the run's config.
        model: the sharded model; its forward runs through DistributedModelParallel.
        train, validation: readers of the two splits, for this rank.
        ranks: this rank's place; folder: the run folder; say: prints a line on rank 0.
        log_fingerprint: kept with every checkpoint, see `compatible`; plan: the sharding plan in force.

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
    ) -> None:
        self.config, self.model, self.ranks, self.folder, self.say = config, model, ranks, folder, say
        self.log_fingerprint, self.plan = log_fingerprint, plan
        self.train_reader, self.validation_reader = train, validation
        self.optimizer = run_optimizer(model, config)
        self.rates = RateSetter(model, self.optimizer)
        steps = run_steps(config.train, train.candidates, config.data.batch_candidates)
        self.schedules = dense_schedule(config.train, steps), table_schedule(config.train, steps)
        guard = Guard(ranks, folder.path)
        self.step = TrainStep(config, model, self.optimizer, ranks.world_size, guard)
        self.pipeline = Pipeline(config.train.pipeline, model, self.step, ranks.device)
        if remark := remark_on(config.train.pipeline, self.pipeline):
            say(remark)
        self.at = Position()
        self.metrics_of_validation: SplitMetrics | None = None
        self._best_metrics: SplitMetrics | None = None
        # Called with the number of steps done, after whatever else belongs to the step.
        self.after_step: Callable[[int], None] | None = None
        self.meter = _Meter(ranks.device)
        touched = TouchedRows(model) if config.checkpoint.full_every > 1 else None
        self.saver = Saver(folder.checkpoints, config.checkpoint, say, ranks.local_world_size, touched)
        self.interrupts = Interrupts(config.checkpoint)
        self.stopped = self._best_due = False

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
            if start.path is None or not self._finished():
                # Not before: a start that is refused, or has nothing to do, leaves the run as it is.
                from_rank_0(lambda: self.folder.write_config(self.config))
            # Validations after the newest save count, or the last line of metrics.jsonl would come twice.
            known = from_rank_0(lambda: self.folder.drop_metrics_after(self.at.step))
            self.at.validated = max(self.at.validated, known)
            log = MetricsLog(self.folder, self.at.step)
            with self.interrupts.listening(), self.saver, log as self.log:
                with Progress("train", self.ranks.speaks) as self.bar:
                    while not self._finished():
                        self._epoch()
                if not self.stopped:
                    self._validate()
                # The step may be one of those after which a save was due.
                self.saver.settle()
                if self.saver.saved != self.at.step:
                    self._save(last=True)
                self.saver.settle(last=True)
        return self.at

    def _epoch(self) -> None:
        """Train what is left of an epoch; after each step report, validate, save and stop where it is due."""
        config = self.config.train
        self.meter = _Meter(self.ranks.device)
        left = config.max_steps - self.at.step if config.max_steps else None
        # Steps from one validation to the next, before which no step may be read ahead.
        stretches: Iterable[int | None] = [None]
        every = config.validate_every
        if every and self.validation_reader is not None:
            stretches = chain([every - self.at.step % every], repeat(every))
        with (
            closing(self.train_reader.steps(self.at.cursor)) as steps,
            # A pipeline reads ahead, but not beyond the last step.
            closing(self.pipeline.train(islice(steps, left), stretches)) as trained,
        ):
            self._set_rates()
            for step, tally in trained:
                self.at.step, self.at.cursor = self.at.step + 1, step.after
                self.at.candidates += step.batch.step_candidates
                self.meter.add(tally, step.batch.step_candidates)
                if self.at.step % config.log_every == 0:
                    self._report()
                if every and self.at.step % every == 0:
                    self._validate()
                self._between_steps(step.last and self.at.cursor.epoch + 1 == config.epochs)
                self.ranks.check_launcher()
                if self.after_step is not None:
                    self.after_step(self.at.step)
                if self._over():
                    break
                self._set_rates()
        self._report()
        if not self._over():
            self.at.cursor = Cursor(self.at.cursor.epoch + 1)

    def _set_rates(self) -> None:
        """Set the learning rates of the next step."""
        self.rates.set(*self._rate_factors())

    def _rate_factors(self) -> tuple[float, float]:
        """Of dense weights and of tables, see `trainer.update.schedule`."""
        dense, tables = (schedule.factor(self.at.step, self._progress()) for schedule in self.schedules)
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
        due = interrupt.save_due or self._best_due or bool(every and self.at.step % every == 0)
        if due and not (last or self._over()):
            self._save()

    def _finished(self) -> bool:
        """Whether no step is left."""
        return self.at.cursor.epoch >= self.config.train.epochs or self._over()

    def _over(self) -> bool:
        """Whether training ends after the step that was just done, wherever its data stand."""
        limit = self.config.train.max_steps
        return self.stopped or self.ended_early or bool(limit and self.at.step >= limit)

    @property
    def ended_early(self) -> bool:
        """Whether validation has brought nothing for as long as the config waits."""
        return self.at.best.over(self.config.train.early_stopping)

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
        self.log.write(self.at.step, "train", {**losses, **speed, **rates})
        text = f"step {self.at.step}  loss {losses['loss']:.4f}  {rate:,.0f} samples/s"
        self.bar.show(self._progress(), text, last=self._progress() >= 1)
        meter.restart()

    def _validate(self) -> None:
        if self.validation_reader is None or self.at.validated == self.at.step:
            return
        metrics = self._measure(self.validation_reader)
        self.at.validated = self.at.step
        self.log.write(self.at.step, "validation", metrics.entry())
        sampled = "" if metrics.sampled is None else " ({:,} of {:,} candidates)".format(*metrics.sampled)
        self.say(f"validation after step {self.at.step}{sampled}:{metrics.text()}")
        # Whether this validation is the best so far, or the last.
        stopping, best = self.config.train.early_stopping, self.at.best
        if stopping.on:
            self._best_due = best.update(stopping, metrics.tasks, self.at.step)
            if self._best_due:
                self._best_metrics = metrics
            if self.ended_early:
                value = "none" if best.value is None else f"{best.value:.4f} after step {best.step:,}"
                self.say(
                    f"no better {stopping.metric} of {' and '.join(watched(stopping, metrics.tasks))} in "
                    f"{best.fruitless} validation(s): training ends; best: {value}"
                )
        # Time that no step has taken.
        self.meter.take_time()

    def kept_validation(self) -> tuple[SplitMetrics | None, int]:
        """Metrics of the checkpoint that `evaluate` and `export` take, and its step; collective.

        Where that is the best one, and an earlier start has measured it, its weights are loaded and stay.
        """
        reader, best = self.validation_reader, self.at.best
        if reader is None:
            return None, self.at.step
        if best.step in (-1, self.at.step):
            # An earlier start may have measured it.
            return self.metrics_of_validation or self._measure(reader), self.at.step
        if self._best_metrics is None:
            best_start = checkpoint.find_to_use(self.folder.checkpoints)
            for line in best_start.lines:
                self.say(line)
            path, step = best_start.path, int(best_start.state["step"])
            assert path is not None
            self.load(lambda tensors: checkpoint.load_tensors(path, tensors))
            return self._measure(reader), step
        return self._best_metrics, best.step

    def _measure(self, reader: SequenceLogReader) -> SplitMetrics:
        device, folder = self.ranks.device, self.folder.path
        with self.pipeline.paused(), scored_split(self.model, reader, device, folder) as scores:
            metrics = shared_metrics(scores, reader)
        self.metrics_of_validation = metrics
        return metrics

    def _sample(self) -> dict[str, Any] | None:
        """What validations score of the split, None = all of it."""
        sample = self.validation_reader and self.validation_reader.sample
        return asdict(sample) if sample else None

    def _progress(self) -> float:
        return progress_of(self.config.train, self.at.step, self.at.candidates, self.train_reader.candidates)

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
        self._best_due = False
        state = {
            **asdict(self.at),
            "cpu_s": self.cpu_seconds(),
            "world_size": self.ranks.world_size,
            "log": self.log_fingerprint,
            "plan": self.plan,
            "order": self.train_reader.order,
            "sample": self._sample(),
            "config": self.config.model_dump(mode="json"),
        }
        from_rank_0(lambda: self.log.keep(self.config.checkpoint.on_error == "continue"))
        self.saver.save(self.at.step, self._tensors(), state, best=self.at.best.step, last=last)
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
        check_reshardable(path, state, self.plan)
        check_same_order(path, state, self.train_reader.order, self.config.data.log)
        self.load(lambda tensors: checkpoint.load_tensors(path, tensors))
        # Older checkpoints know of no best.
        best, now = Best(**state.get("best", {})), self.config.train.early_stopping
        why = changed_watch(state["config"], now, self.train_reader.columns.tasks)
        # Older checkpoints have measured the whole split.
        if not why and state.get("sample") != self._sample():
            why = "validations score other candidates since (train.validate_candidates)"
        if best != Best() and why:
            self.say(f"{why}: the best validation so far, after step {best.step:,}, is no longer kept")
            best = Best()
        self.at = Position(
            step=state["step"],
            cursor=Cursor(**state["cursor"]),
            candidates=state["candidates"],
            wall_s=state["wall_s"],
            cpu_s=state["cpu_s"] / self.ranks.world_size,
            validated=state["validated"],
            best=best,
        )
        self.saver.saved = self.step.number = self.at.step
        self.saver.refused = set(start.refused_names)
        self.saver.follow(path, state.get("base", {}).get("links", 0))
        self.say(f"resumed from {path}")


class _Meter:
    """What was trained since the last report.

    Attributes:
        candidates: of all ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._sums = device, list[torch.Tensor]()
        self.candidates = 0
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def add(self, tally: Tally, candidates: int) -> None:
        if self._sums:
            self._sums = [before + now for before, now in zip(self._sums, tally, strict=True)]
        else:
            self._sums = list(tally)
        self.candidates += candidates

    def sums(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values, counts and total of the tallies of all steps and ranks; collective."""
        values, counts, total = (sum_over_ranks(part.to(self._device)) for part in self._sums)
        return values, counts, total

    def restart(self) -> None:
        self._sums, self.candidates = [], 0

    def take_time(self) -> tuple[float, float]:
        """Wall and CPU seconds of this process since the last call."""
        before = self._wall, self._cpu
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self._wall - before[0], self._cpu - before[1]
