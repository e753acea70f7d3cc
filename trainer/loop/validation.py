"""Measures the model on the validation split, in the middle of training."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchrec.distributed.model_parallel import DistributedModelParallel

from trainer.data.reader import SequenceLogReader
from trainer.loop.pipeline import Pipeline
from trainer.loop.stage import Stage
from trainer.quality.domains import SplitMetrics
from trainer.quality.evaluate import scored_split, shared_metrics
from trainer.ranks.process_group import Ranks


class Validation:
    """The validation split of a run.

    Args:
        reader: of the split, None where the log has none; folder: for scores that do not fit into memory.

    Attributes:
        newest, best: metrics of the newest validation, and of the best of the phase, where this start has
            measured it.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        reader: SequenceLogReader | None,
        ranks: Ranks,
        folder: Path,
        stage: Stage,
    ) -> None:
        self._model, self._ranks, self._folder, self._stage = model, ranks, folder, stage
        self.reader = reader
        self.newest: SplitMetrics | None = None
        self.best: SplitMetrics | None = None

    def measure(self, pipeline: Pipeline) -> SplitMetrics:
        """Score the split with the weights as they are; collective."""
        assert self.reader is not None
        device = self._ranks.device
        with pipeline.paused(), scored_split(self._model, self.reader, device, self._folder) as scores:
            metrics = shared_metrics(scores, self.reader)
        self._stage.settle_mode()
        return metrics

    @property
    def sample(self) -> dict[str, Any] | None:
        """What is scored of the split, None = all of it."""
        sample = self.reader and self.reader.sample
        return asdict(sample) if sample else None
