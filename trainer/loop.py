"""The training loop: data -> step -> metrics -> checkpoint, resumed from wherever the run stands."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from embeddings.errors import ConfigError, DataError
from trainer import checkpoint
from trainer.config import Config
from trainer.data.reader import Cursor, SequenceLogReader, Step
from trainer.distributed import Ranks, naming_the_lost, sum_over_ranks
from trainer.evaluation import score_split, shared_metrics
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
        wall_s, cpu_s: spent in training steps so far, by this rank (checkpoints keep cpu_s of all ranks).
        validated: step of the newest validation, -1 before the first.
    """

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    candidates: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    validated: int = -1


class Trainer:
    """One training run on one rank.

    Args:
        config: the run's config.
        model: the sharded model; its forward runs through DistributedModelParallel.
        train, validation: readers of the two splits, for this rank.
        ranks: this rank's place; folder: the run folder; say: prints a line on rank 0.
        log_fingerprint: kept with every checkpoint, see `trainer.resume`.
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
    ) -> None:
        self.config, self.model, self.ranks, self.folder, self.say = config, model, ranks, folder, say
        self.log_fingerprint = log_fingerprint
        self.train_reader, self.validation_reader = train, validation
        self.optimizer = make_optimizer(model, config.train.learning_rate)
        self.rates = RateSetter(model, self.optimizer)
        self.at = Position()
        self.metrics_of_validation: Metrics | None = None
        # Called with the number of steps done, after whatever else belongs to the step.
        self.after_step: Callable[[int], None] | None = None
        self.meter = _Meter(ranks.device)

    def run(self, start: checkpoint.Found) -> Position:
        """Train from a checkpoint, or from the beginning, to the end; returns where it ended.

        Raises:
            DataError: the loss is no longer a number; what was saved before stays, nothing is saved after.
            RankError: another rank, or the launcher, is gone or hangs.
        """
        with naming_the_lost(self.ranks, lambda: f"after step {self.at.step}"):
            return self._run(start)

    def _run(self, start: checkpoint.Found) -> Position:
        if start.path is not None:
            self._resume(start.path, start.state)
        if self.ranks.speaks:
            self.folder.drop_metrics_after(self.at.step)
        epochs = self.config.train.epochs
        with MetricsLog(self.folder, self.ranks.speaks, self.at.step) as self.log:
            with Progress("train", self.ranks.speaks) as self.bar:
                while self.at.cursor.epoch < epochs and not self._step_limit():
                    self._epoch()
            self._validate()
            if start.path is None or self.at.step != start.state["step"]:
                self._save()
        return self.at

    def _epoch(self) -> None:
        config = self.config.train
        self.meter = _Meter(self.ranks.device)
        with closing(self.train_reader.steps(self.at.cursor)) as steps:
            for step in steps:
                self.rates.set(rate_factor(config, self.at.step, self._progress()))
                loss = self._train(step)
                self.at.step, self.at.cursor = self.at.step + 1, step.after
                self.at.candidates += step.batch.step_candidates
                self.meter.add(loss, step.batch.step_candidates)
                if self.at.step % config.log_every == 0:
                    self._report()
                if config.validate_every and self.at.step % config.validate_every == 0:
                    self._validate()
                if (
                    self.config.checkpoint.every_steps
                    and self.at.step % self.config.checkpoint.every_steps == 0
                ):
                    self._save()
                self.ranks.check_launcher()
                if self.after_step is not None:
                    self.after_step(self.at.step)
                if self._step_limit():
                    break
        self._report()
        if not self._step_limit():
            self.at.cursor = Cursor(self.at.cursor.epoch + 1)

    def _train(self, step: Step) -> Tensor:
        weight = self.config.model.auxiliary_weight
        return train_step(self.model, self.optimizer, step, self.ranks.world_size, self.ranks.device, weight)

    def _report(self) -> None:
        """Write what was trained since the last report; every rank stops here if the loss is no number."""
        meter = self.meter
        if meter.candidates == 0:
            return
        wall, cpu = meter.clock.take()
        self.at.wall_s, self.at.cpu_s = self.at.wall_s + wall, self.at.cpu_s + cpu
        mean = float(sum_over_ranks(meter.loss)) / meter.candidates
        if not math.isfinite(mean):
            raise DataError(
                f"the loss is {mean} within the steps up to {self.at.step}; look at the labels, or lower the "
                f"learning rates (nothing was saved since; see {self.folder.checkpoints})"
            )
        rate = meter.candidates / max(wall, 1e-9)
        values = {"loss": mean, "samples": self.at.candidates, "samples_per_s": rate}
        factor = rate_factor(self.config.train, self.at.step, self._progress())
        self.log.write(self.at.step, "train", {**values, "rate_factor": factor})
        text = f"step {self.at.step}  loss {mean:.4f}  {rate:,.0f} samples/s"
        self.bar.show(self._progress(), text, last=self._progress() >= 1)
        meter.restart()

    def _validate(self) -> None:
        if self.validation_reader is None or self.at.validated == self.at.step:
            return
        metrics = shared_metrics(score_split(self.model, self.validation_reader, self.ranks.device))
        self.metrics_of_validation, self.at.validated = metrics, self.at.step
        self.log.write(self.at.step, "validation", metrics.as_dict())
        self.say(
            f"validation after step {self.at.step}: AUC {metrics.auc:.4f}  GAUC {metrics.gauc:.4f}  "
            f"logloss {metrics.logloss:.4f}  PCOC {metrics.pcoc:.3f}"
        )
        self.meter.clock.restart()

    def _progress(self) -> float:
        return progress_of(self.config.train, self.at.step, self.at.candidates, self.train_reader.candidates)

    def _step_limit(self) -> bool:
        limit = self.config.train.max_steps
        return bool(limit) and self.at.step >= limit

    def cpu_seconds(self) -> float:
        """CPU seconds of the training steps of all ranks; collective."""
        mine = torch.tensor(self.at.cpu_s, dtype=torch.float64, device=self.ranks.device)
        return float(sum_over_ranks(mine))

    def _tensors(self) -> dict[str, object]:
        return {"model": self.model.state_dict(), "optim": self.optimizer.state_dict()}

    def _save(self) -> None:
        self._report()
        state = {
            **asdict(self.at),
            "cpu_s": self.cpu_seconds(),
            "world_size": self.ranks.world_size,
            "log": self.log_fingerprint,
            "order": self.train_reader.order,
            "config": self.config.model_dump(mode="json"),
        }
        path = checkpoint.save(
            self.folder.checkpoints, self.at.step, self._tensors(), state, self.config.checkpoint.keep
        )
        self.say(f"checkpoint {path}")
        self.meter.clock.restart()

    def _resume(self, path: Path, state: dict[str, Any]) -> None:
        """Continue from a verified checkpoint.

        Raises:
            ConfigError: it stands inside an epoch, and the log's rows lie in another order since.
        """
        if state["cursor"]["blocks"] and state["order"] != self.train_reader.order:
            raise ConfigError(
                f"{path} stands inside an epoch, and the rows of {self.config.data.log} lie in other files "
                "or another order since (or other row groups are skipped), so some would be read twice and "
                "some never; give the log as it was, or name another --out"
            )
        tensors = self._tensors()
        checkpoint.load_tensors(path, tensors)
        self.model.load_state_dict(tensors["model"])
        self.optimizer.load_state_dict(tensors["optim"])
        self.at = Position(
            step=state["step"],
            cursor=Cursor(**state["cursor"]),
            candidates=state["candidates"],
            wall_s=state["wall_s"],
            cpu_s=state["cpu_s"] / self.ranks.world_size,
            validated=state["validated"],
        )
        self.say(f"resumed from {path}")


class _Meter:
    """What was trained since the last report.

    Attributes:
        loss: sum over this rank's candidates; candidates: of all ranks; clock: of the training steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), device=device)
        self.candidates = 0
        self.clock = _Clock()

    def add(self, loss: torch.Tensor, candidates: int) -> None:
        self.loss += loss
        self.candidates += candidates

    def restart(self) -> None:
        self.loss.zero_()
        self.candidates = 0


class _Clock:
    """Wall and CPU seconds of this process."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def take(self) -> tuple[float, float]:
        """Seconds since the last call or restart."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self.restart()
        return wall, cpu
