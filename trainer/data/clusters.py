"""Clusters of long histories in the data path: a batch holds the behaviors that stand for them.

A chunk of a history is clustered once it is complete, and one behavior stands for each of its clusters (see
`trainer.log.clusters`). A request sees the clusters of the chunks that are complete before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trainer.data.batch import Clusters
from trainer.data.blocks import Selection, newest_behaviors
from trainer.data.rows import UserRows
from trainer.log.bags import Ints


class ClusteredBlock:
    """The clusters that the requests of a block see. `selection` also has each window's recent behaviors.

    Args:
        rows: the block's row group, with clusters; history: the block's stretch of its behaviors.
        of_requests: the block's requests in the row group; requests: [7, r], see `WindowedRows`.
        chunk: behaviors of a chunk; recent: newest behaviors of each window that are kept for themselves.
    """

    def __init__(
        self, rows: UserRows, history: slice, of_requests: slice, requests: Ints, chunk: int, recent: int
    ) -> None:
        assert rows.cluster_size is not None and rows.cluster_time is not None
        self._requests, self._chunk = requests, chunk
        user = int(np.searchsorted(rows.request_offsets, of_requests.start, side="right")) - 1
        self._user_start = int(rows.history_offsets[user])
        start, end = requests[3] - history.start, requests[4] - history.start
        stands = np.nonzero(rows.cluster_size[history])[0]
        stands = stands[self._chunk_end(history.start + stands) <= history.stop]
        kept = np.union1d(stands, newest_behaviors(start, end, recent))
        self.selection = Selection.of(history, kept, start, end)
        self.size, self.time = (part[self.selection.kept] for part in (rows.cluster_size, rows.cluster_time))
        self.until = self._chunk_end(self.selection.kept)

    def _chunk_end(self, behaviors: Ints) -> Ints:
        """Where the chunks of behaviors end; both count from the row group's first."""
        place = behaviors - self._user_start
        return self._user_start + (place // self._chunk + 1) * self._chunk

    def most_visible(self) -> int:
        """Most clusters that a request sees: those in its window, of complete chunks."""
        stands, until = self.selection.kept[self.size > 0], self.until[self.size > 0]
        before = np.searchsorted(stands, self._requests[3])
        return int((np.searchsorted(until, self._requests[4], side="right") - before).max())


def join_clusters(blocks: Sequence[ClusteredBlock], end: Ints) -> Clusters:
    """The clusters of a batch. `end`: int64 [R], where each request's window ends in its row group."""
    parts = ([getattr(block, name) for block in blocks] for name in ("size", "time", "until"))
    size, time, until = (torch.from_numpy(np.concatenate(part)) for part in parts)
    return Clusters(size, time, until, torch.from_numpy(end.copy()))
