"""The order in which the work of several batches is done: a plain loop, or one of TorchRec's train pipelines.

Pipelines copy a later step to the device and exchange its ids while the present one is computed. They carry
whole steps (`trainer.data.reader.Step`), so that each arrives with its cursor, however far they read ahead.

Where something else is to use the tables after a given step, such as a validation, `Pipeline.train` is told
so before: the pipeline then reads no step beyond that one, and begins anew after it. Where FBGEMM has
filled a cache for a batch, the next lookup takes the places of that batch's rows, whatever it looks up (see
`prefetch` in split_table_batched_embeddings_ops_training.py). So no such batch may wait during a validation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist

from embeddings.errors import ConfigError, RankError
from embeddings.lookup.caches import fills_caches, forget_prefetched, unlocked
from embeddings.private import detach
from trainer.data.reader import Step
from trainer.objectives.step_loss import Tally
from trainer.ranks.process_group import tells_of_a_lost_rank
from trainer.update.step import TrainStep

# A step that has been trained, and what it adds to the report on this rank.
TrainedStep = tuple[Step, Tally]
Forward = Callable[[Step], tuple[Tensor, TrainedStep]]


class PlainLoop:
    """One step after the other, by the calls of TorchRec's pipelines."""

    # Nothing is ever read ahead.
    batches: Collection[Step] = ()

    def __init__(self, step: TrainStep, device: torch.device, forward: Forward) -> None:
        self._step, self._device, self._forward = step, device, forward

    def progress(self, steps: Iterator[Step]) -> TrainedStep:
        """Raises StopIteration after the last step."""
        # On CUDA the reader has pinned the batch, and only then the host does not wait for its copy.
        step = next(steps).to(self._device, non_blocking=True)
        self._step.zero_grad()
        # The names that TorchRec's pipelines give these ranges.
        with record_function("## forward ##"):
            loss, trained = self._forward(step)
        with record_function("## backward ##"):
            loss.backward()
        self._step.step()
        return trained


class Pipeline:
    """Trains a sharded model on steps.

    Args:
        kind: `train.pipeline` of the config, see `kind_for`.
        model: sharded; step: what is done with each step's batch.
        device: of this rank.
    """

    def __init__(
        self, kind: str, model: DistributedModelParallel, step: TrainStep, device: torch.device
    ) -> None:
        self.kind = kind_for(kind, device, fills_caches(model.plan))
        self._step, self._device, self._model = step, device, model
        self._inner: Any
        if self.kind == "none":
            self._inner = PlainLoop(step, device, self._forward)
        else:
            kinds = {"sparse_dist": TrainPipelineSparseDist, "prefetch": PrefetchTrainPipelineSparseDist}
            # With pipeline_postproc a module that makes ids (such as our search) is run ahead where it has no
            # weights, and weights of a table may lie on one rank only: ranks would disagree.
            self._inner = kinds[self.kind](
                model, step, device, custom_model_fwd=self._forward, pipeline_postproc=False
            )

    @property
    def ahead(self) -> int:
        """How many steps were read and are not trained yet."""
        return len(self._inner.batches)

    def train(
        self, steps: Iterable[Step], stretches: Iterable[int | None] = (None,)
    ) -> Generator[TrainedStep, None, None]:
        """Train the steps in order; gives each once it is trained, on the device.

        A learning rate that is set before a step is asked for is the one that it is trained with. All ranks
        must consume equally many steps; what was read ahead is dropped where the consumer stops early.

        Args:
            stretches: how many steps, at least 1, are trained until nothing is read ahead, again and again;
                None: all that are left.

        Raises:
            DataError: a step is not finite, see `TrainStep.step`. Where the guard reads late, also once the
                steps are over or the consumer stops, unless that is because a rank is lost.
        """
        ordered, lost = iter(steps), False
        try:
            for length in stretches:
                stretch, trained = _read(islice(ordered, length)), None
                while True:
                    try:
                        trained = self._inner.progress(stretch)
                    except StopIteration:
                        break
                    yield trained
                if trained is None:
                    # The steps were over before this stretch.
                    break
            self._step.settle()
        except BaseException as error:
            stopped = isinstance(error, GeneratorExit)
            # Python keeps there what the consumer stops for.
            cause = error.__context__ if stopped else error
            lost = cause is not None and (isinstance(cause, RankError) or tells_of_a_lost_rank(cause))
            if stopped and not lost:
                self._step.settle()
            raise
        finally:
            # What was read ahead is forgotten, and the model left with its own forward pass.
            if self.kind != "none":
                detach(self._inner)
                self._inner.reset()
                # The device may still wait for a lost rank, so nobody may wait for the device.
                if self.kind == "prefetch" and not lost:
                    forget_prefetched(self._model)
                # With nothing in flight this only has the next batch traced anew.
                self._inner.attach()

    def settle(self) -> None:
        """Raise DataError where the last step was not finite and that was not said yet; see `TrainStep`."""
        self._step.settle()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Give the model its own forward pass back for a while, to evaluate it in the middle of training."""
        self._step.settle()
        if self.kind == "none":
            yield
            return
        if self.kind == "prefetch" and self.ahead:
            raise RuntimeError("caches hold rows of batches to come; tell Pipeline.train when to pause")
        self._inner.detach()
        try:
            with unlocked(self._model):
                yield
        finally:
            if self.kind == "prefetch":
                forget_prefetched(self._model)
            # The next batch's ids have been exchanged already: only forward passes are replaced again.
            self._inner.attach(sparse_dist=False)

    def _forward(self, step: Step) -> tuple[Tensor, TrainedStep]:
        loss, tally = self._step.forward(step)
        return loss, (step, tally)


def _read(steps: Iterator[Step]) -> Iterator[Step]:
    """The same steps; reading them is a range of its own in a profile."""
    while True:
        with record_function("## read ##"):
            step = next(steps, None)
        if step is None:
            return
        yield step


def kind_for(kind: str, device: torch.device, caches: bool = True) -> str:
    """What `train.pipeline` means on a device; `caches`: some table has a cache that can be filled ahead.

    Raises:
        ConfigError: it needs CUDA.
    """
    if kind == "auto":
        return "sparse_dist" if device.type == "cuda" else "none"
    if kind == "prefetch" and device.type != "cuda":
        raise ConfigError(
            f'train.pipeline = "prefetch" fills caches of device memory, which {device.type} has not; '
            'use "none" or "sparse_dist"'
        )
    return "sparse_dist" if kind == "prefetch" and not caches else kind


def remark_on(kind: str, pipeline: Pipeline) -> str:
    """What a user should know who asked for one kind of pipeline and got another; else empty."""
    if kind != "prefetch" or pipeline.kind == kind:
        return ""
    return (
        f'train.pipeline = "prefetch" has no cache to fill, so that "{pipeline.kind}" is used: no table that '
        'is looked up before the search has the kernel "fused_uvm_caching" (see plan.allow_unified_memory)'
    )
