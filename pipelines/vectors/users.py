"""The users of a split, each as their last request in it sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.score import open_requests
from trainer.config.sections import DataConfig
from trainer.data.batch import RequestBatch
from trainer.data.blocks import Block, LazyRows, with_windows
from trainer.data.collate import collate
from trainer.data.files import RowGroup
from trainer.data.rows import Columns, read_rows
from trainer.log.bags import Ints
from trainer.snapshot import Snapshot
from trainer.snapshot.retrieval.spaces.space import Space
from trainer.snapshot.retrieval.vector_files import Floats

# What one model call takes: requests, and behaviors of them together.
_REQUESTS, _BEHAVIORS = 256, 1 << 18


class Users(NamedTuple):
    """Some users, in the order of the log.

    Attributes:
        user, request, time: int64 [n], of their last requests; group: int64 [n], that of its first candidate.
        vector: float32 [n, G, width]; offset: float32 [n], see `UserVectors`.
    """

    user: Ints
    request: Ints
    time: Ints
    group: Ints
    vector: Floats
    offset: Floats


@dataclass(frozen=True)
class UserSource:
    """Where users are read from.

    Attributes:
        snapshot, space: what makes vectors; data, columns: how requests are read; places: row groups.
        remarks: on what the log lacks.
    """

    snapshot: Snapshot
    space: Space
    data: DataConfig
    columns: Columns
    places: Sequence[RowGroup]
    remarks: tuple[str, ...] = ()

    @staticmethod
    def of(snapshot: Snapshot, space: Space, log: Path, split: str) -> UserSource:
        """Raises DataError where the log does not fit the snapshot."""
        reader, remarks = open_requests(snapshot, log, split)
        columns = reader.columns
        snapshot.check_vocabularies({**columns.features, **columns.context}, log)
        return UserSource(snapshot, space, reader.config, columns, reader.row_groups, tuple(remarks))

    def stream(self, places: Sequence[RowGroup] | None = None) -> Iterator[Users]:
        """The users of these row groups, or of all."""
        for place in self.places if places is None else places:
            for batch in self.batches(place):
                yield self._users(batch)

    def batches(self, place: RowGroup) -> Iterator[RequestBatch]:
        """The last requests with candidates of the users of a row group; who has none is left out."""
        rows = read_rows(place.file, place.row_group, self.columns)
        windowed = with_windows(rows, self.data.history_length, self.data.ingestion_delay)
        lazy = LazyRows(place, lambda: windowed)
        counts = np.diff(rows.candidate_offsets)
        start, end = windowed.requests[3:5]
        blocks: list[Block] = []
        behaviors = 0
        for last in _last_requests(rows.request_offsets, counts).tolist():
            size = int(end[last] - start[last])
            if blocks and (len(blocks) >= _REQUESTS or behaviors + size > _BEHAVIORS):
                yield self._batch(blocks)
                blocks, behaviors = [], 0
            blocks.append(Block((), last, last + 1, size, int(counts[last]), lazy))
            behaviors += size
        if blocks:
            yield self._batch(blocks)

    def _batch(self, blocks: Sequence[Block]) -> RequestBatch:
        return collate(blocks, self.data, self.columns, sum(block.candidates for block in blocks))

    def _users(self, batch: RequestBatch) -> Users:
        rows = self.snapshot.with_rows(batch)
        found = self.space.users(rows)
        group = np.zeros(batch.requests, dtype=np.int64)
        if self.space.group_feature:
            first = np.searchsorted(batch.candidate_request.numpy(), np.arange(batch.requests))
            bags = batch.features[self.space.group_feature]
            group = bags.values()[bags.offsets()[:-1][batch.behaviors + first].long()].numpy()
        vector, offset = found.vector.numpy(), found.offset.numpy()
        times = batch.request_time.numpy()
        return Users(batch.user_id.numpy(), batch.request_id.numpy(), times, group, vector, offset)


def _last_requests(request_offsets: Ints, candidates: Ints) -> Ints:
    """Of each user the last request that has a candidate.

    Args:
        request_offsets: [U + 1]; candidates: [requests].
    """
    full = np.flatnonzero(candidates > 0)
    user = np.searchsorted(request_offsets, full, side="right") - 1
    return full[np.append(user[1:] != user[:-1], True)] if full.size else full
