"""Loops over batches held in memory, timed: a bare TorchRec loop, and the trainer's own."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from trainer.checkpoint.save_load import ResumePoint
from trainer.data.reader import Cursor, SequenceLogReader, Step
from trainer.loop.loop import Trainer
from trainer.objectives.bce import loss_sum
from trainer.ranks.process_group import Ranks
from trainer.run_config import Config
from trainer.run_folder import RunFolder


class Seconds(NamedTuple):
    """By the clock on the wall, and of this process's threads."""

    wall: float
    cpu: float


@contextmanager
def one_thread() -> Iterator[None]:
    """Around a benchmark, or as its decorator: torch computes on a single thread meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def timed(work: Callable[[], object]) -> Seconds:
    """What the work takes, with all that it gives a device to do."""
    _wait_for_device()
    started, started_cpu = time.perf_counter(), time.process_time()
    work()
    _wait_for_device()
    return Seconds(time.perf_counter() - started, time.process_time() - started_cpu)


def _wait_for_device() -> None:
    # Where nothing runs on CUDA, to ask it would open a context.
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Replay:
    """Stands for a reader: steps that were read before."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.all, self.order = steps, ""
        self.candidates = sum(step.batch.step_candidates for step in steps)

    def steps(self, cursor: Cursor) -> Iterator[Step]:
        yield from self.all


def bare_loop(
    model: DistributedModelParallel, optimizer: Any, steps: Sequence[Step], ranks: Ranks
) -> Seconds:
    """What TorchRec's documentation does, and no more."""

    def work() -> None:
        for step in steps:
            batch = step.batch.to(ranks.device, non_blocking=True)
            optimizer.zero_grad()
            total = loss_sum(model(batch).logits, batch.labels, batch.weight)
            (total / batch.step_candidates).backward()
            optimizer.step()

    return timed(work)


class Unsaved(Trainer):
    """The end of a measurement is no checkpoint."""

    def _save(self) -> None:
        self._report()


def trainer_loop(
    config: Config, model: DistributedModelParallel, steps: Sequence[Step], ranks: Ranks, folder: Path
) -> Seconds:
    """All of it but validation and checkpoints: schedules, metrics, progress, TensorBoard as configured."""
    train = config.train.model_copy(update={"epochs": 1, "validate_every": 0})
    checkpoint = config.checkpoint.model_copy(update={"every_steps": 0, "every_minutes": 0.0})
    config = config.model_copy(update={"train": train, "checkpoint": checkpoint})
    with tempfile.TemporaryDirectory(dir=folder) as run, redirect_stdout(io.StringIO()):
        reader = cast(SequenceLogReader, Replay(steps))
        trainer = Unsaved(config, model, reader, None, ranks, RunFolder(Path(run)), lambda _: None, "", {})
        end = trainer.run(ResumePoint(None, {}, []))
    return Seconds(end.wall_s, end.cpu_s)
