"""Measures the model on the validation split, in the middle of training."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.profiler import record_function
from torchrec.distributed.model_parallel import DistributedModelParallel

from trainer.checkpoint import save_load as checkpoint
from trainer.data.reader import SequenceLogReader
from trainer.loop.early_stopping import Best, changed_watch, watched
from trainer.loop.living import LivingIds
from trainer.loop.phases import Phase, stopping_before
from trainer.loop.pipeline import Pipeline
from trainer.loop.position import Position
from trainer.loop.stage import Stage
from trainer.quality.domains import SplitMetrics
from trainer.quality.evaluate import scored_split, shared_metrics
from trainer.quality.scored import Scores
from trainer.ranks.process_group import Ranks
from trainer.update.kept import KeptWeights

VALIDATION = "## validation ##"
"""The name of the range of a validation in a profile."""


class Validation:
    """The validation split of a run.

    Args:
        reader: of the split, None where the log has none; folder: for scores that do not fit into memory.
        living: the id stage, or None where no feature's ids come and go.

    Attributes:
        reader: of what is measured in the present phase, None = nothing is.
        newest, best: metrics of the newest validation, and of the best of the phase, where this start has
            measured it.
        kept: the best weights of the phase, where they need no checkpoint; due: else, whether the present
            ones are to be saved as the best.
        lacks: why nothing is measured in the present phase; empty if there is no such reason.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        reader: SequenceLogReader | None,
        ranks: Ranks,
        folder: Path,
        stage: Stage,
        living: LivingIds | None = None,
    ) -> None:
        self._living = living
        self._model, self._ranks, self._folder, self._stage = model, ranks, folder, stage
        self.reader = self._whole = reader
        self.newest: SplitMetrics | None = None
        self.best: SplitMetrics | None = None
        self.kept: KeptWeights | None = None
        self.due, self.lacks = False, ""

    def follow(self, phase: Phase) -> None:
        """Measure what is to be measured in a phase; collective."""
        self.best, self.due, self.reader, self.lacks = None, False, self._whole, ""
        if phase.each is not None and self._whole is not None:
            there = phase.each in self._whole.by_domain
            self.reader = self._whole.of_domains((phase.each,)) if there else None
            if not there:
                self.lacks = f"the validation split has no candidate of domain {phase.each}"
        self.kept = self._stage.kept(phase) if self.reader is not None else None

    def of_all(self) -> None:
        """Measure the whole split from now on."""
        if self.reader is not self._whole:
            self.reader, self.newest, self.best = self._whole, None, None

    def judge(self, at: Position, phase: Phase, metrics: SplitMetrics) -> str:
        """Whether this validation is the best of a phase that looks for it; -> a line where it ends by it."""
        stopping, best = phase.train.early_stopping, at.best
        if not stopping.on:
            return ""
        if best.update(stopping, metrics.tasks, at.step):
            self.best = metrics
            if self.kept is not None:
                self.kept.take()
            self.due = self.kept is None
        else:
            self.due = False
        if not best.over(stopping):
            return ""
        value = "none" if best.value is None else f"{best.value:.4f} after step {best.step:,}"
        return (
            f"no better {stopping.metric} of {' and '.join(watched(stopping, metrics.tasks))} in "
            f"{best.fruitless} validation(s): {phase.name or 'training'} ends; best: {value}"
        )

    def state(self, best: Best) -> dict[str, Any]:
        """What a checkpoint says of validations.

        The best checkpoint is not spoken of where there is none, since its weights are kept in each.
        """
        if self.kept is None:
            return {"sample": self.sample, "best": asdict(best)}
        return {"sample": self.sample, "best": asdict(Best()), "kept": asdict(best)}

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint keeps besides, of the best weights."""
        return {} if self.kept is None else {"kept": self.kept.tensors}

    def resume(
        self, path: Path, state: dict[str, Any], phase: Phase, tasks: Collection[str]
    ) -> tuple[Best, str]:
        """The best validation of the phase so far, as a checkpoint knows it; a line where it is forgotten.

        Args:
            tasks: of the run.
        """
        # Older checkpoints know of no best.
        best, now = Best(**state.get("kept", state.get("best", {}))), phase.train.early_stopping
        before = {**state["config"], "train": {"early_stopping": stopping_before(state["config"], phase)}}
        why = changed_watch(before, now, tasks)
        # Older checkpoints have measured the whole split.
        if not why and state.get("sample") != self.sample:
            why = "validations score other candidates since (train.validate_candidates)"
        if not why and ("kept" in state) != (self.kept is not None):
            why = f"{phase.key}: other parts are frozen since"
        if not why and self.kept is not None:
            checkpoint.load_tensors(path, self.tensors())
        if best == Best() or not why:
            return best, ""
        return Best(), f"{why}: the best validation so far, after step {best.step:,}, is no longer kept"

    def measure(self, pipeline: Pipeline) -> SplitMetrics:
        """Score the split with the weights as they are; collective."""
        assert self.reader is not None
        # A range of its own: a profile of steps leaves it out.
        with record_function(VALIDATION), self.scored(self.reader, pipeline) as scores:
            return shared_metrics(scores, self.reader)

    @contextmanager
    def scored(self, reader: SequenceLogReader, pipeline: Pipeline) -> Iterator[Scores]:
        """Scores of what a reader reads, with the weights and maps as they are; collective, see
        `scored_split`."""
        given = self._model, reader, self._ranks.device, self._folder
        with ExitStack() as opened:
            opened.enter_context(pipeline.paused())
            if self._living is None:
                yield opened.enter_context(scored_split(*given))
            else:
                opened.enter_context(self._living.as_trained())
                yield opened.enter_context(scored_split(*given, self._living.looked_up))
        self._stage.settle_mode()

    @property
    def sample(self) -> dict[str, Any] | None:
        """What is scored of the split, None = all of it."""
        sample = self.reader and self.reader.sample
        return asdict(sample) if sample else None
