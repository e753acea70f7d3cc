"""The order in which the work of several batches is done: a plain loop, or one of TorchRec's train pipelines.

Pipelines copy a later batch to the device and exchange its ids while the present one is computed. They read
ahead, so what a batch is (`trainer.data.reader.Step`, with its cursor) is kept beside it until it is trained.

Where something else is to use the tables after a given step, such as a validation, `Pipeline.train` is told
so before: the pipeline then reads no batch beyond that step, and begins anew after it. Where FBGEMM has
filled a cache for a batch, the next lookup takes the places of that batch's rows, whatever it looks up (see
`prefetch` in split_table_batched_embeddings_ops_training.py). So no such batch may wait during a validation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import PrefetchTrainPipelineSparseDist, TrainPipelineSparseDist

from embeddings.errors import ConfigError, RankError
from embeddings.lookup.caches import fills_caches, forget_prefetched, unlocked
from trainer.data.batch import RequestBatch
from trainer.data.reader import Step
from trainer.ranks.process_group import tells_of_a_lost_rank
from trainer.update.step import TrainStep

Forward = Callable[[RequestBatch], tuple[Tensor, Tensor]]


class PlainLoop:
    """One batch after the other, by the calls of TorchRec's pipelines."""

    def __init__(self, step: TrainStep, device: torch.device, forward: Forward) -> None:
        self._step, self._device, self._forward = step, device, forward

    def progress(self, batches: Iterator[RequestBatch]) -> Tensor:
        """Raises StopIteration after the last batch."""
        # On CUDA the reader has pinned the batch, and only then the host does not wait for its copy.
        batch = next(batches).to(self._device, non_blocking=True)
        self._step.zero_grad()
        # The names that TorchRec's pipelines give these ranges.
        with record_function("## forward ##"):
            loss, counted = self._forward(batch)
        with record_function("## backward ##"):
            loss.backward()
        self._step.step()
        return counted


class Pipeline:
    """Trains a sharded model on steps.

    Args:
        kind: `train.pipeline` of the config, see `kind_for`.
        model: sharded; step: what is done with each batch.
        device: of this rank.
    """

    def __init__(
        self, kind: str, model: DistributedModelParallel, step: TrainStep, device: torch.device
    ) -> None:
        self.kind = kind_for(kind, device, fills_caches(model.plan))
        self._step, self._device, self._model = step, device, model
        self._ahead: deque[Step] = deque()
        self._number = 0
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

    def train(
        self,
        steps: Iterable[Step],
        begin: Callable[[], int],
        until: Callable[[], int | None] = lambda: None,
    ) -> Generator[tuple[Step, Tensor], None, None]:
        """Train the steps in order; gives each with this rank's part of its loss' sum once it is trained.

        All ranks must consume equally many; what was read ahead is dropped where the consumer stops early.

        Args:
            begin: called before each step, to set learning rates for instance; returns the step's number.
            until: called where nothing is read ahead; returns after how many steps that is to be so again,
                at least 1, or None for the end of the steps.

        Raises:
            DataError: a step is not finite, see `TrainStep.step`. Where the guard reads late, also once the
                steps are over or the consumer stops, unless that is because a rank is lost.
        """
        ordered, lost = iter(steps), False
        try:
            trained = True
            while trained:
                trained, batches = False, self._read(islice(ordered, until()))
                while True:
                    self._number = begin()
                    try:
                        loss = self._inner.progress(batches)
                    except StopIteration:
                        break
                    trained = True
                    yield self._ahead.popleft(), loss
            self._step.settle()
        except BaseException as error:
            stopped = isinstance(error, GeneratorExit)
            # Python keeps there what the consumer stops for.
            lost = _tells_of_the_lost(error.__context__ if stopped else error)
            if stopped and not lost:
                self._step.settle()
            raise
        finally:
            self._finish(lost)

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
        if self.kind == "prefetch" and self._ahead:
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

    def _read(self, steps: Iterable[Step]) -> Iterator[RequestBatch]:
        ordered = iter(steps)
        while True:
            with record_function("## read ##"):
                step = next(ordered, None)
                if step is None:
                    return
            self._ahead.append(step)
            yield step.batch

    def _forward(self, batch: RequestBatch) -> tuple[Tensor, Tensor]:
        # Batches are trained in the order in which they were read.
        self._step.begin(self._number, self._ahead[0])
        return self._step.forward(batch)

    def _finish(self, lost: bool) -> None:
        """Forget what was read ahead, and leave the model with its own forward pass.

        Args:
            lost: a rank is lost; the device may still wait for it, so nobody may wait for the device.
        """
        self._ahead.clear()
        if self.kind != "none":
            detach(self._inner)
            self._inner.reset()
            if self.kind == "prefetch" and not lost:
                forget_prefetched(self._model)
            # With nothing in flight this only has the next batch traced anew.
            self._inner.attach()


def detach(pipeline: Any) -> None:
    """Give the model that one of TorchRec's pipelines has taken its own forward pass back.

    Where the first exchange of ids has failed, TorchRec 1.8 has taken the forward passes but not yet what
    exchanges the ids, gives the former back, and then says that these are unequally many
    (`_pipeline_detach_model` in train_pipeline/utils.py), in the place of what went wrong.
    """
    with suppress(AssertionError):
        pipeline.detach()


def _tells_of_the_lost(error: BaseException | None) -> bool:
    return isinstance(error, RankError) or (error is not None and tells_of_a_lost_rank(error))


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
