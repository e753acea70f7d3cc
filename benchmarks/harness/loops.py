"""Loops over batches held in memory, timed: a bare TorchRec loop, and the trainer's own."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import Any, cast

from torch import device
from torchrec.distributed.model_parallel import DistributedModelParallel

from benchmarks.harness.timing import Seconds, seconds_of
from trainer.checkpoint.save_load import ResumePoint
from trainer.data.batch import RequestBatch
from trainer.data.cursor import Cursor
from trainer.data.reader import SequenceLogReader, Step
from trainer.loop.loop import Trainer
from trainer.objectives.step_loss import StepLoss
from trainer.ranks.process_group import Ranks
from trainer.run_config import Config
from trainer.run_folder import RunFolder


class Replay:
    """Stands in for a reader: it gives steps that were read before."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.all, self.order = steps, ""
        self.candidates = sum(step.batch.step_candidates for step in steps)

    def steps(self, cursor: Cursor | None = None) -> Iterator[Step]:
        yield from self.all


def bare_loop(
    model: DistributedModelParallel, optimizer: Any, steps: Sequence[Step], ranks: Ranks
) -> Seconds:
    """The training loop of TorchRec's documentation, and no more."""

    def work() -> None:
        for step in steps:
            bare_step(model, optimizer, step.batch, ranks.device)

    return seconds_of(work)


def bare_step(model: DistributedModelParallel, optimizer: Any, given: RequestBatch, device: device) -> None:
    """One step of that loop."""
    batch = given.to(device, non_blocking=True)
    optimizer.zero_grad()
    shell = model.module
    # The losses of the same tasks, in the default objective.
    losses = StepLoss(shell.tasks, domains=shell.domains)
    total = losses.of(Step(batch, True, Cursor()), model(batch), shell.config.auxiliary_weight).total()
    (total / batch.step_candidates).backward()
    optimizer.step()


def first_steps(reader: SequenceLogReader, enough: Callable[[list[Step]], bool]) -> Replay:
    """The reader's steps from the beginning until there are enough of them, held in memory."""
    held: list[Step] = []
    with closing(reader.steps()) as steps:
        for step in steps:
            held.append(step)
            if enough(held):
                break
    return Replay(held)


class NonSavingTrainer(Trainer):
    """A trainer that writes no checkpoint at the end of a measurement."""

    def _save(self, last: bool = False) -> None:
        self._report()


def trainer_loop(
    config: Config, model: DistributedModelParallel, steps: Sequence[Step], ranks: Ranks, folder: Path
) -> Seconds:
    """The trainer's loop without validation and checkpoints. Schedules, metrics, progress and TensorBoard
    are as the config says.
    """
    train = config.train.model_copy(update={"epochs": 1, "validate_every": 0})
    checkpoint = config.checkpoint.model_copy(update={"every_steps": 0, "every_minutes": 0.0})
    config = config.model_copy(update={"train": train, "checkpoint": checkpoint})
    with tempfile.TemporaryDirectory(dir=folder) as run, redirect_stdout(io.StringIO()):
        reader = cast(SequenceLogReader, Replay(steps))
        trainer = NonSavingTrainer(
            config, model, reader, None, ranks, RunFolder(Path(run)), lambda _: None, "", {}
        )
        end = trainer.run(ResumePoint(None, {}, []))
    return Seconds(end.wall_s, end.cpu_s)
