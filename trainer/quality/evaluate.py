"""Scoring a split over all ranks, in eval mode, with nothing dropped."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from embeddings.agreement import from_every_rank, from_rank_0
from embeddings.errors import DataError
from embeddings.private import detach
from trainer.data.batch import RequestBatch
from trainer.data.reader import SequenceLogReader, Step
from trainer.model.windows import places_in_groups
from trainer.quality.domains import SplitMetrics, measure_split
from trainer.quality.runs import Runs
from trainer.quality.score_files import IN_MEMORY, ScoreFiles, joined
from trainer.quality.scored import KEYS, Scored, Scores, columns_of
from trainer.ranks.host_copy import Unloading
from trainer.ranks.process_group import gather_rows
from trainer.sealed_folder import remove_folder, scratch
from trainer.storage.objects import remove_left
from trainer.storage.places import is_remote

# Batches whose scores are on their way to the host at a time.
_UNDER_WAY = 8
Mapped = Callable[[Iterator[Step]], Iterator[Step]]


@contextmanager
def scored_split(
    model: nn.Module,
    reader: SequenceLogReader,
    device: torch.device,
    folder: Path,
    mapped: Mapped | None = None,
) -> Iterator[Scores]:
    """Score every candidate of the reader's split once; collective.

    Args:
        folder: shared by all ranks, for the scores of a split that is too large for the memory of one.
        mapped: makes the steps that are scored of those that are read; None: they are the same.

    Returns:
        On rank 0 all candidates, as long as the context lasts; on the others none that count.
    """
    if reader.expected <= IN_MEMORY:
        yield score_split(model, reader, device, mapped=mapped)
        return
    with ExitStack() as held:

        def made() -> tuple[Path, Path]:
            # By rank 0 alone, which takes it away once everything is measured.
            own = held.enter_context(scratch(folder, f"scores-{reader.split}"))
            if not is_remote(folder):
                return own, own
            # Of a store, that folder lies on this machine, where ranks on others cannot write.
            remove_left(folder, "tandemrec-scores-*.tmp-*")
            shared = folder / own.name
            held.callback(remove_folder, shared)
            return own, shared

        own, shared = from_rank_0(made)
        runs, tasks = Runs(shared, f"rank-{reader.rank:05d}"), reader.columns.tasks
        for value, key in _scored_rows(model, reader, device, None, mapped):
            runs.add(columns_of(_scored(value, key, tasks)))

        def written() -> list[Path]:
            runs.flush()
            return runs.files

        files = [file for own in from_every_rank(written, slow=True) for file in own]
        nothing = torch.zeros(0, _width(reader)), torch.zeros(0, len(KEYS)).long()
        yield ScoreFiles(files, own) if reader.rank == 0 and files else _scored(*nothing, tasks)


def score_split(
    model: nn.Module,
    reader: SequenceLogReader,
    device: torch.device,
    pipelined: bool | None = None,
    mapped: Mapped | None = None,
) -> Scored:
    """Score every candidate of the reader's split once; collective.

    Args:
        pipelined: a batch is copied to the device, and its ids travel, while another one is scored; None: a
            sharded model on CUDA.
        mapped: see `scored_split`.

    Returns:
        On rank 0 all candidates in the order of their names, the same whatever the number of ranks; on the
        others none. They lie in main memory: 8 bytes a task and candidate, 40 more for the names, and 8 for
        the domain.
    """
    rows = list(_scored_rows(model, reader, device, pipelined, mapped))
    width = len(KEYS) + bool(reader.config.domain)
    no_values, no_keys = torch.zeros(0, _width(reader)), torch.zeros(0, width).long()
    all_values = gather_rows(torch.cat([no_values, *(value for value, _ in rows)]))
    all_keys = gather_rows(torch.cat([no_keys, *(key for _, key in rows)]))
    return _scored(all_values, all_keys, reader.columns.tasks).in_order()


@torch.no_grad()
def _scored_rows(
    model: nn.Module,
    reader: SequenceLogReader,
    device: torch.device,
    pipelined: bool | None,
    mapped: Mapped | None,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """What `_rows` makes of each batch of this rank, on the host."""
    if pipelined is None:
        pipelined = device.type == "cuda" and isinstance(model, DistributedModelParallel)
    was_training = model.training
    model.eval()
    # Off the device at once: a split may be larger than its memory.
    values, keys = Unloading(_UNDER_WAY), Unloading(_UNDER_WAY)
    with closing(reader.steps()) as read:
        steps = iter(read) if mapped is None else mapped(read)
        if pipelined:
            scored = _pipelined(model, steps, device)
        else:
            moved = (step.to(device, non_blocking=True) for step in steps)
            scored = ((step, model(step.batch).logits.sigmoid()) for step in moved)
        with closing(scored):
            for step, score in scored:
                if step.counted:
                    value, key = _rows(step.batch, score, _weighted(reader))
                    values.add(value)
                    keys.add(key)
                    yield from zip(values.arrived(), keys.arrived(), strict=True)
    yield from zip(values.all(), keys.all(), strict=True)
    model.train(was_training)


def _pipelined(
    model: nn.Module, steps: Iterator[Step], device: torch.device
) -> Generator[tuple[Step, Tensor], None, None]:
    """-> steps and their scores [C, T], both on the device.

    By the pipeline that trains, which only scores while the model is in eval mode.

    TorchRec's own `EvalPipelineSparseDist` (version 1.8) drops what the model returns first, starts the
    exchange of the first batch twice, and reads in a thread that goes on after some errors.
    """

    def forward(step: Step) -> tuple[Tensor, tuple[Step, Tensor]]:
        score = model(step.batch).logits.sigmoid()
        # In the place of the loss, which nobody looks at in eval mode.
        return score, (step, score)

    pipeline: Any = TrainPipelineSparseDist(
        model, None, device, custom_model_fwd=forward, pipeline_postproc=False
    )
    try:
        while True:
            try:
                scored = pipeline.progress(steps)
            except StopIteration:
                return
            yield scored
    finally:
        detach(pipeline)


def shared_metrics(scored: Scores, reader: SequenceLogReader) -> SplitMetrics:
    """Metrics of what `score_split` or `scored_split` gave, on every rank; rank 0 computes them, collective.

    Raises:
        DataError: no user of the split belongs to a sample of this size.
    """

    def measured() -> SplitMetrics:
        count = scored.size
        if reader.sample is None:
            return measure_split(scored, reader.config.log, reader.config.domain)
        if not count:
            raise DataError(
                f"a sample of {reader.split} is so small that it holds no user; raise "
                "train.validate_candidates, or --sample",
                file=reader.config.log,
            )
        of_sample = measure_split(scored, reader.config.log, reader.config.domain)
        return replace(of_sample, sampled=(count, reader.candidates))

    return from_rank_0(measured, slow=True)


def score_requests(score: Callable[[RequestBatch], Tensor], reader: SequenceLogReader, limit: int) -> Scored:
    """Score the first `limit` requests of a split (0 = all) in one process, in stored order."""
    return joined(list(score_in_order(score, reader, limit)))


def score_in_order(
    score: Callable[[RequestBatch], Tensor], reader: SequenceLogReader, limit: int
) -> Iterator[Scored]:
    """The same, a batch at a time; each request is in one of them. Sample weights are left out."""
    seen, last = 0, None
    with closing(reader.steps()) as steps:
        for step in steps:
            scored = _scored(*_rows(step.batch, score(step.batch), weighted=False), reader.columns.tasks)
            keys = np.stack([scored.user_id, scored.request_id], axis=1)
            new = np.r_[last is None or (keys[0] != last).any(), (np.diff(keys, axis=0) != 0).any(axis=1)]
            number, last = seen + np.cumsum(new), keys[-1]
            yield scored.part(number <= limit) if limit else scored
            seen = int(number[-1])
            if limit and seen >= limit:
                break


def _rows(batch: RequestBatch, score_CT: Tensor, weighted: bool) -> tuple[Tensor, Tensor]:
    request = batch.candidate_request
    within = places_in_groups(request, batch.requests)
    item = batch.candidate_items
    if item is None:
        item = torch.full_like(within, -1)
    named = [batch.user_id[request], batch.request_id[request], within, item, batch.seen[request]]
    keys = torch.stack(named if batch.domain is None else [*named, batch.domain], dim=1)
    values = [score_CT, batch.labels]
    if weighted:
        weight_C1, of_tasks = batch.weight[:, None], batch.task_weight
        values.append(weight_C1.expand_as(batch.labels) if of_tasks is None else weight_C1 * of_tasks)
    return torch.cat(values, dim=1), keys


def _weighted(reader: SequenceLogReader) -> bool:
    """Whether candidates have sample weights."""
    return reader.columns.weighted or bool(reader.columns.labels.weights)


def _width(reader: SequenceLogReader) -> int:
    """Numbers that `_rows` gives for each candidate."""
    return (3 if _weighted(reader) else 2) * len(reader.columns.tasks)


def _scored(values: Tensor, keys: Tensor, tasks: Sequence[str]) -> Scored:
    # Of each task its score, its label and, where there are weights, its weight.
    kinds = values.shape[1] // len(tasks)
    score, label, *weight = (
        values.cpu().numpy().reshape(values.shape[0], kinds, len(tasks)).transpose(1, 0, 2)
    )
    user, request, candidate, item, history, *domain = keys.cpu().numpy().T
    return Scored(
        score,
        label,
        user,
        request,
        candidate,
        item,
        history,
        tuple(tasks),
        domain[0] if domain else None,
        weight[0] if weight else None,
    )
