"""The training loop: data -> step -> metrics -> checkpoint, resumed from wherever the run stands."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from embeddings.errors import CheckpointError, DataError
from trainer import checkpoint
from trainer.config import Config
from trainer.data.reader import Cursor, Prefetcher, SequenceLogReader
from trainer.distributed import Ranks, sum_over_ranks
from trainer.evaluation import score_split
from trainer.metrics import Metrics
from trainer.progress import Progress
from trainer.run import MetricsLog, RunFolder
from trainer.schedule import progress_of, rate_factor
from trainer.step import RateSetter, make_optimizer, train_step


@dataclass
class Position:
    """Where training stands: what a checkpoint keeps besides tensors.

    Attributes:
        step: steps done; cursor: next block to read; candidates: trained so far, over all ranks.
        wall_s, cpu_s: spent in training steps so far; cpu_s is summed over ranks.
    """

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    candidates: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0


class Trainer:
    """One training run on one rank.

    Args:
        config: the run's config.
        model: the sharded model; its forward runs through DistributedModelParallel.
        train, validation: readers of the two splits, for this rank.
        ranks: this rank's place; folder: the run folder; say: prints a line on rank 0.
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
    ) -> None:
        self.config, self.model, self.ranks, self.folder, self.say = config, model, ranks, folder, say
        self.train_reader, self.validation_reader = train, validation
        self.optimizer = make_optimizer(model, config.train.learning_rate)
        self.rates = RateSetter(model, self.optimizer)
        self.at = Position()
        self.metrics_of_validation: Metrics | None = None

    def run(self) -> Position:
        """Train to the end; returns where it ended."""
        self._resume()
        config = self.config.train
        with MetricsLog(self.folder, self.ranks.speaks) as log, Progress("train", self.ranks.speaks) as bar:
            while self.at.cursor.epoch < config.epochs and not self._step_limit():
                self._epoch(log, bar)
            self._validate(log)
        self._save()
        return self.at

    def _epoch(self, log: MetricsLog, bar: Progress) -> None:
        config, loss = self.config.train, torch.zeros((), device=self.ranks.device)
        seen, clock = 0, _Clock()
        steps = self.train_reader.steps(self.at.cursor)
        try:
            for step in steps:
                self.rates.set(rate_factor(config, self.at.step, self._progress()))
                loss += train_step(self.model, self.optimizer, step, self.ranks.world_size, self.ranks.device)
                self.at.step, self.at.cursor = self.at.step + 1, step.after
                self.at.candidates += step.batch.step_candidates
                seen += step.batch.step_candidates
                if self.at.step % config.log_every == 0 or self._step_limit():
                    self._log(log, bar, loss, seen, clock)
                    seen, loss = 0, torch.zeros_like(loss)
                self._between_steps(log, clock)
                if self._step_limit():
                    return
        finally:
            if isinstance(steps, Prefetcher):
                steps.close()
            self._charge(clock)
        self.at.cursor = Cursor(self.at.cursor.epoch + 1)

    def _between_steps(self, log: MetricsLog, clock: _Clock) -> None:
        every, save_every = self.config.train.validate_every, self.config.checkpoint.every_steps
        if every and self.at.step % every == 0:
            self._charge(clock)
            self._validate(log)
            clock.restart()
        if save_every and self.at.step % save_every == 0:
            self._charge(clock)
            self._save()
            clock.restart()

    def _log(self, log: MetricsLog, bar: Progress, loss: torch.Tensor, seen: int, clock: _Clock) -> None:
        self._charge(clock)
        mean = float(sum_over_ranks(loss)) / seen
        if not mean < float("inf"):
            raise DataError(
                f"the loss is {mean} at step {self.at.step}; look at the labels, or lower the learning rates "
                f"(the newest checkpoint is in {self.folder.checkpoints})"
            )
        rate = seen / clock.since_log()
        log.write(
            self.at.step,
            "train",
            {
                "loss": mean,
                "samples": self.at.candidates,
                "samples_per_s": rate,
                "rate_factor": rate_factor(self.config.train, self.at.step, self._progress()),
            },
        )
        text = f"step {self.at.step}  loss {mean:.4f}  {rate:,.0f} samples/s"
        bar.show(self._progress(), text, last=self._step_limit())

    def _validate(self, log: MetricsLog) -> None:
        if self.validation_reader is None:
            return
        metrics = score_split(self.model, self.validation_reader, self.ranks.device).metrics()
        self.metrics_of_validation = metrics
        log.write(self.at.step, "validation", metrics.as_dict())
        self.say(
            f"validation after step {self.at.step}: AUC {metrics.auc:.4f}  GAUC {metrics.gauc:.4f}  "
            f"logloss {metrics.logloss:.4f}  PCOC {metrics.pcoc:.3f}"
        )

    def _progress(self) -> float:
        return progress_of(self.config.train, self.at.step, self.at.candidates, self.train_reader.candidates)

    def _step_limit(self) -> bool:
        limit = self.config.train.max_steps
        return bool(limit) and self.at.step >= limit

    def _charge(self, clock: _Clock) -> None:
        wall, cpu = clock.take()
        self.at.wall_s += wall
        self.at.cpu_s += cpu

    def cpu_seconds(self) -> float:
        """CPU seconds of the training steps of all ranks; collective."""
        mine = torch.tensor(self.at.cpu_s, dtype=torch.float64, device=self.ranks.device)
        return float(sum_over_ranks(mine))

    def _tensors(self) -> dict[str, object]:
        return {"model": self.model.state_dict(), "optim": self.optimizer.state_dict()}

    def _save(self) -> None:
        state = {
            **asdict(self.at),
            "cpu_s": self.cpu_seconds(),
            "world_size": self.ranks.world_size,
            "config": self.config.model_dump(mode="json"),
        }
        path = checkpoint.save(
            self.folder.checkpoints, self.at.step, self._tensors(), state, self.config.checkpoint.keep
        )
        self.say(f"checkpoint {path}")

    def _resume(self) -> None:
        """Continue from the newest checkpoint that verifies, if the run has one."""
        path, refused = checkpoint.newest(self.folder.checkpoints)
        for reason in refused:
            self.say(f"refused checkpoint: {reason}")
        if path is None:
            if refused:
                raise CheckpointError(
                    self.folder.checkpoints, "no checkpoint verifies; use another --out, or restore one"
                )
            return
        state = checkpoint.read_state(path)
        tensors = self._tensors()
        checkpoint.load_tensors(path, tensors)
        self.model.load_state_dict(tensors["model"])
        self.optimizer.load_state_dict(tensors["optim"])
        share = state["cpu_s"] / self.ranks.world_size
        self.at = Position(
            state["step"], Cursor(**state["cursor"]), state["candidates"], state["wall_s"], share
        )
        if self.ranks.speaks:
            self.folder.drop_metrics_after(self.at.step)
        self.say(f"resumed from {path}")


class _Clock:
    """Wall and CPU seconds of the training steps, without validation and saving."""

    def __init__(self) -> None:
        self._log = 0.0
        self.restart()

    def restart(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def take(self) -> tuple[float, float]:
        """Seconds since the last call or restart."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self.restart()
        self._log += wall
        return wall, cpu

    def since_log(self) -> float:
        """Wall seconds since the last call."""
        seconds, self._log = self._log, 0.0
        return max(seconds, 1e-9)
