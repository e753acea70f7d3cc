"""A sharded model and what trains it, put together as the trainer does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.check import ROOT, Check
from benchmarks.gpu.logs import small_log
from pipelines.start import open_split
from tests.programs.step_cases import SMALL, local_tensors
from trainer.assemble import ShardedModel, build_sharded, feature_rows
from trainer.data.reader import SequenceLogReader, Step
from trainer.log.schema import LogManifest, read_manifest
from trainer.loop.pipeline import Pipeline
from trainer.quality.evaluate import score_split
from trainer.ranks.process_group import Ranks
from trainer.run_config import Config, load_config
from trainer.update.guard import Guard
from trainer.update.step import TrainStep, make_optimizer


@dataclass
class Job:
    """One rank's model, optimizer and pipeline."""

    config: Config
    sharded: ShardedModel
    optimizer: Any
    pipeline: Pipeline
    ranks: Ranks

    def train(self, steps: Iterable[Step]) -> list[float]:
        """The sum of every step's loss."""
        return [float(tally.total) for _, tally in self.pipeline.train(steps)]

    def train_and_pause(self, steps: Iterable[Step], after: int | None) -> list[float]:
        """The same with an evaluation after so many steps, which the pipeline is told of before."""
        losses: list[float] = []
        for _, tally in self.pipeline.train(steps, [None] if after is None else [after, None]):
            losses.append(float(tally.total))
            if len(losses) == after:
                self.scores()
        return losses

    def reader(self, split: str, seed: int | None = None) -> SequenceLogReader:
        return open_split(self.config, split, feature_rows(self.sharded.groups), self.ranks, seed)

    def scores(self, split: str = "validation") -> list[float]:
        """Of every candidate of a split, by an evaluation in the midst of training."""
        with self.pipeline.paused():
            scored = score_split(self.sharded.model, self.reader(split), self.ranks.device)
        found: list[float] = scored.score[:, 0].tolist()
        return found

    def tensors(self) -> dict[str, Any]:
        """This rank's part of weights and optimizer states, by name, on the CPU."""
        return on_cpu(self.state())

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"model": self.sharded.model.state_dict(), "optim": self.optimizer.state_dict()}


def on_cpu(tree: Any) -> dict[str, Any]:
    """Copies of this rank's tensors in a state dict, by name."""
    return {name: tensor.detach().cpu().clone() for name, tensor in local_tensors(tree)}


def small_config(check: Check, overrides: Sequence[str] = ()) -> Config:
    """DARE, cut down to the small log."""
    words = [f"data.log={small_log(check)}", *SMALL, *overrides]
    return load_config(ROOT / "configs" / "dare.toml", words)


def job(
    config: Config, manifest: LogManifest, ranks: Ranks, folder: Path | None, kind: str | None = None
) -> Job:
    """Args:
    folder: where the guard keeps the batch of a bad step; None: no guard.
    kind: the train pipeline; None: as configured.
    """
    sharded = build_sharded(config, manifest, ranks, training=True)
    optimizer = make_optimizer(sharded.model, config.train)
    return Job(
        config, sharded, optimizer, pipeline_of(config, sharded, optimizer, ranks, folder, kind), ranks
    )


def pipeline_of(
    config: Config,
    sharded: ShardedModel,
    optimizer: Any,
    ranks: Ranks,
    folder: Path | None,
    kind: str | None = None,
) -> Pipeline:
    """A pipeline over a model that is there already."""
    guard = None if folder is None else Guard(ranks, folder)
    step = TrainStep(config, sharded.model, optimizer, ranks.world_size, guard)
    return Pipeline(kind or config.train.pipeline, sharded.model, step, ranks.device)


def small_job(
    check: Check, ranks: Ranks, folder: Path | None, kind: str = "none", overrides: Sequence[str] = ()
) -> Job:
    config = small_config(check, overrides)
    return job(config, read_manifest(Path(config.data.log)), ranks, folder, kind)
