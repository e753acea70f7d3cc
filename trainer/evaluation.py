"""Scoring a split over all ranks, in eval mode, with nothing dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np
import torch
from torch import Tensor, nn

from embeddings.agreement import from_rank_0
from trainer.data.batch import RequestBatch
from trainer.data.reader import SequenceLogReader
from trainer.distributed import gather_rows
from trainer.metrics import Metrics
from trainer.model.windows import places_in_groups
from trainer.scored import KEYS, Scored


@torch.no_grad()
def score_split(model: nn.Module, reader: SequenceLogReader, device: torch.device) -> Scored:
    """Score every candidate of the reader's split once; collective.

    Returns:
        On rank 0 all candidates in the order of their names, the same whatever the number of ranks; on the
        others none. They lie in main memory: 8 bytes a task and candidate, 40 more for the names.
    """
    was_training = model.training
    model.eval()
    parts = []
    with closing(reader.steps()) as steps:
        for step in steps:
            batch = step.batch.to(device)
            score = model(batch).logits.sigmoid()
            if step.counted:
                # Off the device at once: a split may be larger than its memory.
                parts.append(tuple(part.cpu() for part in _rows(batch, score)))
    model.train(was_training)
    no_values, no_keys = torch.zeros(0, 2 * len(reader.columns.tasks)), torch.zeros(0, len(KEYS)).long()
    values = gather_rows(torch.cat([no_values, *(row for row, _ in parts)]))
    keys = gather_rows(torch.cat([no_keys, *(key for _, key in parts)]))
    return _scored(values, keys, reader.columns.tasks).in_order()


def shared_metrics(scored: Scored) -> dict[str, Metrics]:
    """Metrics by task of what `score_split` returned, on every rank; rank 0 computes them, collective."""
    return from_rank_0(scored.all_metrics, slow=True)


def score_requests(score: Callable[[RequestBatch], Tensor], reader: SequenceLogReader, limit: int) -> Scored:
    """Score the first `limit` requests of a split (0 = all) in one process, in stored order."""
    parts, seen = [], 0
    with closing(reader.steps()) as steps:
        for step in steps:
            parts.append(_rows(step.batch, score(step.batch)))
            seen += step.batch.requests
            if limit and seen >= limit:
                break
    rows, keys = (torch.cat(part) for part in zip(*parts, strict=True))
    scored = _scored(rows, keys, reader.columns.tasks)
    return _first_requests(scored, limit) if limit else scored


def _rows(batch: RequestBatch, score_CT: Tensor) -> tuple[Tensor, Tensor]:
    request = batch.candidate_request
    within = places_in_groups(request, batch.requests)
    item = torch.full_like(within, -1)
    if "item_id" in batch.features.keys():  # noqa: SIM118 - no dict
        item = batch.features["item_id"].values()[batch.behaviors :]
    named = [batch.user_id[request], batch.request_id[request], within, item, batch.seen[request]]
    keys = torch.stack(named, dim=1)
    return torch.cat([score_CT, batch.labels], dim=1), keys


def _scored(values: Tensor, keys: Tensor, tasks: Sequence[str]) -> Scored:
    score, label = values.cpu().numpy().reshape(values.shape[0], 2, values.shape[1] // 2).transpose(1, 0, 2)
    user, request, candidate, item, history = keys.cpu().numpy().T
    return Scored(score, label, user, request, candidate, item, history, tuple(tasks))


def _first_requests(scored: Scored, limit: int) -> Scored:
    new = np.r_[True, (np.diff(scored.request_id) != 0) | (np.diff(scored.user_id) != 0)]
    keep = np.cumsum(new) <= limit
    return scored.part(keep)
