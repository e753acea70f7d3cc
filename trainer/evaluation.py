"""Scoring a whole split over all ranks, in eval mode, with nothing dropped; and keeping the scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from embeddings.agreement import from_rank_0
from embeddings.errors import DataError
from trainer.data.batch import RequestBatch
from trainer.data.reader import SequenceLogReader
from trainer.distributed import gather_rows
from trainer.durable import replacing
from trainer.metrics import Metrics, group_keys, measure

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
KEYS = ("user_id", "request_id", "candidate", "item_id", "history")
HISTORY_EDGES = (0, 1, 10, 50, 200, 1000, 5000)


@dataclass(frozen=True)
class Scored:
    """Candidates with their scores.

    Attributes:
        score, label: float32 [n, T], probabilities and labels.
        user_id, request_id, candidate: int64 [n]; `candidate` counts within its request.
        item_id: int64 [n], the candidate's id in the log's vocabulary; -1 where the log has no such feature.
        history: int64 [n], behaviors that the request saw, at most L.
    """

    score: Floats
    label: Floats
    user_id: Ints
    request_id: Ints
    candidate: Ints
    item_id: Ints
    history: Ints

    @property
    def requests(self) -> int:
        return int(np.unique(np.stack([self.user_id, self.request_id]), axis=1).shape[1])

    def metrics(self, task: int = 0) -> Metrics:
        groups = group_keys(self.user_id, self.request_id)
        return measure(self.score[:, task].astype(np.float64), self.label[:, task].astype(np.float64), groups)

    def by_history(self, edges: Sequence[int] = HISTORY_EDGES) -> dict[str, Metrics]:
        """Metrics of slices by the length of the history, [edge, next edge); empty slices are left out."""
        slices = {}
        for low, high in zip(edges, [*edges[1:], None], strict=True):
            inside = (self.history >= low) & (self.history < high if high is not None else True)
            if inside.any():
                last = "or more" if high is None else f"to {high - 1:,}"
                name = f"{low:,}" if high == low + 1 else f"{low:,} {last}"
                slices[name] = self.part(inside).metrics()
        return slices

    def in_order(self) -> Scored:
        """The same candidates by user, request and place in the request: sums over them round alike."""
        return self.part(np.lexsort((self.candidate, self.request_id, self.user_id)))

    def part(self, chosen: npt.NDArray[np.bool_] | Ints) -> Scored:
        """Only the chosen candidates, by a mask or by their places."""
        return Scored(*(getattr(self, field.name)[chosen] for field in fields(Scored)))


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
    return _scored(values, keys).in_order()


def shared_metrics(scored: Scored) -> Metrics:
    """The metrics of what `score_split` returned, on every rank; rank 0 computes them, collective."""
    return from_rank_0(scored.metrics, slow=True)


def score_requests(score: Callable[[RequestBatch], Tensor], reader: SequenceLogReader, limit: int) -> Scored:
    """Score the first `limit` requests of a split (0 = all) in one process, in stored order."""
    parts, seen = [], 0
    with closing(reader.steps()) as steps:
        for step in steps:
            parts.append(_rows(step.batch, score(step.batch)))
            seen += step.batch.requests
            if limit and seen >= limit:
                break
    scored = _scored(torch.cat([row for row, _ in parts]), torch.cat([key for _, key in parts]))
    return _first_requests(scored, limit) if limit else scored


def write_scores(scored: Scored, path: Path) -> None:
    """One Parquet row a candidate: user_id, request_id, candidate, item_id, score_<t>, label_<t>."""
    columns: dict[str, npt.NDArray[np.generic]] = {
        "user_id": scored.user_id,
        "request_id": scored.request_id,
        "candidate": scored.candidate,
        "item_id": scored.item_id,
        "history": scored.history,
    }
    for task in range(scored.score.shape[1]):
        columns[f"score_{task}"] = scored.score[:, task]
        columns[f"label_{task}"] = scored.label[:, task]
    with replacing(path) as part:
        pq.write_table(pa.table(columns), part, compression="zstd", write_page_checksum=True)


def read_scores(path: Path) -> Scored:
    """What `write_scores` wrote.

    Raises:
        DataError: missing or not such a file.
    """
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        tasks = sum(name.startswith("score_") for name in table.column_names)
        score = [table.column(f"score_{t}").to_numpy() for t in range(tasks)]
        label = [table.column(f"label_{t}").to_numpy() for t in range(tasks)]
        keys = [table.column(name).to_numpy() for name in KEYS]
    except (OSError, pa.ArrowException, KeyError) as error:
        raise DataError(f"holds no scores of `tandemrec evaluate`: {error}", file=path) from None
    return Scored(np.stack(score, axis=1), np.stack(label, axis=1), *keys)


def compare_scores(some: Scored, all_scores: Scored) -> tuple[float, float]:
    """Find every candidate of `some` in `all_scores`.

    Returns:
        The largest absolute difference (infinite if a candidate is missing), and the share of candidates
        whose scores are bit-equal.
    """
    place = {key: i for i, key in enumerate(_keys(all_scores))}
    found = np.array([place.get(key, -1) for key in _keys(some)])
    if found.size == 0 or (found < 0).any():
        return float("inf"), 0.0
    other = all_scores.score[found]
    return float(np.abs(some.score - other).max()), float((some.score == other).all(axis=1).mean())


def _keys(scored: Scored) -> list[tuple[int, int, int]]:
    return list(
        zip(scored.user_id.tolist(), scored.request_id.tolist(), scored.candidate.tolist(), strict=True)
    )


def _rows(batch: RequestBatch, score_CT: Tensor) -> tuple[Tensor, Tensor]:
    request = batch.candidate_request
    counts = torch.bincount(request, minlength=batch.requests)
    within = (
        torch.arange(batch.candidates, device=request.device) - (torch.cumsum(counts, 0) - counts)[request]
    )
    item = torch.full_like(within, -1)
    if "item_id" in batch.features.keys():  # noqa: SIM118 - no dict
        item = batch.features["item_id"].values()[batch.behaviors :]
    named = [batch.user_id[request], batch.request_id[request], within, item, batch.seen[request]]
    keys = torch.stack(named, dim=1)
    return torch.cat([score_CT, batch.labels], dim=1), keys


def _scored(values: Tensor, keys: Tensor) -> Scored:
    score, label = values.cpu().numpy().reshape(values.shape[0], 2, values.shape[1] // 2).transpose(1, 0, 2)
    return Scored(score, label, *keys.cpu().numpy().T)


def _first_requests(scored: Scored, limit: int) -> Scored:
    new = np.r_[True, (np.diff(scored.request_id) != 0) | (np.diff(scored.user_id) != 0)]
    keep = np.cumsum(new) <= limit
    return scored.part(keep)
