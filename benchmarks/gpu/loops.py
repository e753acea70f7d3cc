"""Training loops over made-up steps, timed: the trainer's in its variants, and a bare TorchRec loop."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import trainer.assemble
from benchmarks.gpu.check import Row
from benchmarks.gpu.inputs import steps_of
from benchmarks.gpu.measure import forget_memory, host_waits, memory
from benchmarks.gpu.training import Job, pipeline_of
from benchmarks.harness.loops import bare_step
from benchmarks.harness.timing import seconds_of
from benchmarks.inputs.cells import Cell, config_of
from trainer.assemble import build_sharded
from trainer.data.batch import pinning
from trainer.data.reader import Step
from trainer.loop.pipeline import Pipeline
from trainer.ranks.process_group import Ranks
from trainer.run_config import Config
from trainer.step_size import StepSize
from trainer.update.step import make_optimizer

Change = Callable[[Config], Config]


@dataclass(frozen=True)
class Way:
    """How steps are trained: with which pipeline, with or without the guard, in which precision."""

    kind: str
    guarded: bool = True
    bf16: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}{'' if self.guarded else ', no guard'}{', bf16' if self.bf16 else ''}"


class Loops:
    """A sharded model, steps held in memory, and loops over them.

    Args:
        cell: of `tandemrec bench step`; count: steps, over which loops go round.
        change: applied to the cell's config, to place tables elsewhere for instance.
        rounds: measurements of each way, whose median counts.
    """

    def __init__(
        self,
        cell: Cell,
        ranks: Ranks,
        folder: Path,
        count: int = 4,
        rounds: int = 3,
        change: Change = lambda config: config,
    ) -> None:
        # In pinned memory on CUDA, or each step would wait for its copy, as none of training does.
        self.steps = steps_of(cell, count, pinning(ranks.device))
        self.ranks, self._folder, self._rounds = ranks, folder, rounds
        config, manifest = change(config_of(cell)), cell.shape.manifest()
        started = time.perf_counter()
        with mock.patch.object(trainer.assemble, "step_size", lambda *_, **__: size_of(self.steps)):
            # As in training, where the size of a step is read from a log.
            sharded = build_sharded(config, manifest, ranks, training=True)
        optimizer = make_optimizer(sharded.model, config.train)
        pipeline = pipeline_of(config, sharded, optimizer, ranks, None, "none")
        self.job = Job(config, sharded, optimizer, pipeline, ranks)
        self.built_s = time.perf_counter() - started

    @property
    def candidates(self) -> float:
        """Of a step, on average."""
        return sum(step.batch.candidates for step in self.steps) / len(self.steps)

    def train_steps(self, way: Way) -> Row:
        """Milliseconds of a step, samples a second, and peaks of memory."""
        pipeline = self.pipeline(way)
        return self._time(lambda steps: deque(pipeline.train(steps), maxlen=0))

    def losses(self, way: Way) -> list[float]:
        """Of one further round over the steps."""
        return [float(tally.total) for _, tally in self.pipeline(way).train(self.steps)]

    def bare(self) -> Row:
        """What TorchRec's documentation does and no more."""
        model, optimizer, device = self.job.sharded.model, self.job.optimizer, self.ranks.device
        batches = [step.batch for step in self.steps]

        def work(steps: Iterator[Step]) -> None:
            for _, given in zip(steps, chain.from_iterable(repeat(batches)), strict=False):
                bare_step(model, optimizer, given, device)

        return self._time(work)

    def score_steps(self, bf16: bool) -> Row:
        """Forward passes alone, in eval mode and without gradients."""
        model, device = self.job.sharded.model, self.ranks.device

        def work(steps: Iterator[Step]) -> None:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                for step in steps:
                    model(step.batch.to(device)).logits.sigmoid()

        model.eval()
        try:
            return self._time(work)
        finally:
            model.train()

    def waits(self, way: Way) -> Counter[str]:
        """Where the host waits for the device, by line, in one round over the steps."""
        pipeline = self.pipeline(way)
        deque(pipeline.train(self.steps), maxlen=0)
        with host_waits() as found:
            deque(pipeline.train(self.steps), maxlen=0)
        return found

    def pipeline(self, way: Way) -> Pipeline:
        """A new one over the same model."""
        precision = "bf16" if way.bf16 else "fp32"
        train = self.job.config.train.model_copy(update={"precision": precision})
        config = self.job.config.model_copy(update={"train": train})
        folder = self._folder if way.guarded else None
        return pipeline_of(config, self.job.sharded, self.job.optimizer, self.ranks, folder, way.kind)

    def _time(self, work: Callable[[Iterator[Step]], object]) -> Row:
        each = 2 * len(self.steps)

        def run(count: int) -> float:
            steps = islice(chain.from_iterable(repeat(self.steps)), count)
            return seconds_of(lambda: work(steps)).wall / count

        run(len(self.steps))
        forget_memory()
        taken = statistics.median(run(each) for _ in range(self._rounds))
        return {"ms": 1000 * taken, "samples/s": self.candidates / taken, **memory()}


def size_of(steps: Sequence[Step]) -> StepSize:
    """What the planner is told of steps: of the first one, whose users are alike."""
    batch, users = steps[0].batch, int(steps[0].batch.user_id.unique().numel())
    block = max(1, batch.behaviors // users), max(1, batch.candidates // users)
    return StepSize(batch.behaviors, batch.candidates, batch.requests, (block,) * users, "as drawn")


@contextmanager
def loops_of(cell: Cell, ranks: Ranks, **given: Any) -> Iterator[Loops]:
    """Loops whose memory is given back at the end."""
    with tempfile.TemporaryDirectory() as folder:
        made = Loops(cell, ranks, Path(folder), **given)
        try:
            yield made
        finally:
            del made
            forget_memory()


def with_model(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def shares(rows: Sequence[Row]) -> list[Row]:
    """The rows with their speed as a multiple of the first's and of the one's before, where they have one."""
    found, before = [], rows[0].get("samples/s") if rows else None
    first = before
    for row in rows:
        speed = row.get("samples/s")
        more = (
            {"times the first": speed / first, "times the one before": speed / before}
            if speed and first
            else {}
        )
        found.append({**row, **more})
        before = speed or before
    return found
