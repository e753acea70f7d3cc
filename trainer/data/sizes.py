"""Sizes of a batch as integers on the host: reading one from a tensor would wait for the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from trainer.data.batch import RequestBatch


@dataclass(frozen=True)
class Sizes:
    """What shapes of a forward pass depend on; made where the batch is, out of arrays in main memory.

    Attributes:
        windows: [R], behaviors that each request may see; starts: [R], the first of them in the batch.
        candidates: [R], candidates of each request.
        bags: most ids of a bag, of each feature in the order of the batch's keys.
        one_id: every bag of every feature holds exactly one id.
        clusters: most clusters that a request may see; 0 where the batch has none.
        labelled: every candidate has a label of every task, so that none is NaN.
    """

    windows: tuple[int, ...]
    starts: tuple[int, ...]
    candidates: tuple[int, ...]
    bags: tuple[int, ...]
    one_id: bool
    clusters: int = 0
    labelled: bool = True

    @staticmethod
    def of(batch: RequestBatch) -> Sizes:
        """Read from the tensors of a batch that was made by hand; waits for the device."""
        lengths = batch.features.lengths().view(len(batch.features.keys()), -1)
        return Sizes(
            tuple((batch.window_end - batch.window_start).tolist()),
            tuple(batch.window_start.tolist()),
            tuple(torch.bincount(batch.candidate_request, minlength=batch.requests).tolist()),
            tuple(lengths.amax(1).tolist() if lengths.numel() else [0] * lengths.shape[0]),
            bool((lengths == 1).all()),
            _most_clusters(batch),
            not bool(batch.labels.isnan().any()),
        )

    def longest(self, newest: int = 0) -> int:
        """Behaviors of the longest window, of which only the newest so many count; 0 = all do."""
        longest = max(self.windows, default=0)
        return min(longest, newest) if newest else longest


def _most_clusters(batch: RequestBatch) -> int:
    """The slow way: request by request."""
    most, clusters = 0, batch.clusters
    if clusters is None:
        return most
    each = zip(batch.window_start.tolist(), batch.window_end.tolist(), clusters.end.tolist(), strict=True)
    for start, end, seen in each:
        seen_S = (clusters.size[start:end] > 0) & (clusters.until[start:end] <= seen)
        most = max(most, int(seen_S.sum()))
    return most
