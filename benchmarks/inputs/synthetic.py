"""Made-up batches for benchmarks: Zipf ids from a seed, requests of a user that overlap as logged ones do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trainer.config.sections import DataConfig
from trainer.data.batch import RequestBatch
from trainer.data.blocks import LazyRows, cut_blocks, with_windows
from trainer.data.collate import collate
from trainer.data.files import RowGroup
from trainer.data.row_group import FeatureIds
from trainer.data.rows import Columns, PlanRows, UserRows
from trainer.log.bags import Ids, Ints
from trainer.log.schema import FeatureInfo, LogManifest

ITEM, CATEGORY = "item_id", "category_id"
_ZIPF = 1.05
_SECONDS_APART = 3_600


@dataclass(frozen=True)
class Shape:
    """The shape of a made-up step.

    Attributes:
        items, categories: how many ids occur; id 0 never does.
        spread: the row of an id is the id times this, so that the same rows may lie in a larger table.
        length: L, behaviors that every request sees.
        users: of the step; requests: of each user; candidates: of each request.
        apart: behaviors between two requests of a user. As in DARE's data (19 targets at distance 3, 8, ...,
            93 from the end, two negatives each) by default: windows of L = 200 share 195 with the next one.
    """

    items: int
    categories: int
    length: int
    users: int
    requests: int = 19
    candidates: int = 3
    apart: int = 5
    spread: int = 1

    @property
    def samples(self) -> int:
        return self.users * self.requests * self.candidates

    def manifest(self) -> LogManifest:
        """The manifest of a log that these steps could have come from."""
        rows = {ITEM: self.items * self.spread + 1, CATEGORY: self.categories + 1}
        return LogManifest(
            features={name: FeatureInfo(rows=count) for name, count in rows.items()},
            tasks=["click"],
            taxonomy=[CATEGORY],
            splits={},
            ingest={},
            report={},
        )


class Draws:
    """Steps of one shape; the same seed gives the same steps.

    Popularity falls as rank to the power of -1.05; which item has which rank is random, so that popular rows
    do not lie side by side in the table.
    """

    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape = shape
        self._rng = np.random.default_rng(seed)
        weights = np.arange(1, shape.items + 1, dtype=np.float64) ** -_ZIPF
        self._reach = np.cumsum(weights / weights.sum())
        self._item = self._rng.permutation(shape.items) + 1

    def step(self) -> UserRows:
        """The users of one step."""
        shape, users = self.shape, self.shape.users
        behaviors = shape.length + shape.apart * (shape.requests - 1)
        requests = users * shape.requests
        end = np.tile(shape.length + shape.apart * np.arange(shape.requests), users)
        labels = (self._rng.random((shape.samples, 1)) < 1 / shape.candidates).astype(np.float32)
        return UserRows.of_counts(
            behaviors=np.full(users, behaviors),
            requests=np.full(users, shape.requests),
            candidate_counts=np.full(requests, shape.candidates),
            user_id=np.arange(users),
            history=self._ids(users * behaviors),
            history_time=np.tile(_SECONDS_APART * np.arange(behaviors), users),
            request_time=_SECONDS_APART * end,
            history_end=end,
            candidates=self._ids(shape.samples),
            labels=labels,
        )

    def _ids(self, count: int) -> FeatureIds:
        rank = np.searchsorted(self._reach, self._rng.random(count)).clip(max=self.shape.items - 1)
        item = self._item[rank]
        ids: Ids = np.stack([item * self.shape.spread, 1 + item % self.shape.categories]).astype(np.int32)
        return FeatureIds([ITEM, CATEGORY], ids, {})


def row_per_sample(rows: UserRows) -> UserRows:
    """The same samples with each candidate in a request of its own."""
    counts = np.diff(rows.candidate_offsets)
    total = int(counts.sum())
    per_user = np.add.reduceat(counts, rows.request_offsets[:-1])
    return replace(
        rows,
        request_offsets=np.r_[0, np.cumsum(per_user)],
        request_id=np.arange(total),
        request_time=np.repeat(rows.request_time, counts),
        history_end=np.repeat(rows.history_end, counts),
        candidate_offsets=np.arange(total + 1),
        context=FeatureIds([], np.zeros((0, total), dtype=np.int32), {}),
    )


def as_batch(
    rows: UserRows, manifest: LogManifest, data: DataConfig, requests_per_block: int
) -> RequestBatch:
    """All of the rows as one batch, cut into blocks and laid out as the reader does it."""
    windowed = with_windows(rows, data.history_length, 0)
    plan = PlanRows(rows.request_offsets, rows.history_end, np.diff(rows.candidate_offsets))
    cut = data.model_copy(update={"requests_per_block": requests_per_block, "behaviors_per_block": 1 << 40})
    blocks = cut_blocks(plan, (), LazyRows(RowGroup(Path("made up"), 0), lambda: windowed), cut)
    return collate(blocks, data, Columns.of(manifest), int(rows.candidate_offsets[-1]))


def padded(rows: UserRows, length: int) -> tuple[Ints, Ints]:
    """The input of row-wise code: history [2, C, L], newest first, 0 where there is none; targets [2, C].

    The two features are item and category.
    """
    counts = np.diff(rows.candidate_offsets)
    user = np.repeat(np.arange(rows.user_id.size), np.diff(rows.request_offsets))
    last = np.repeat(rows.history_offsets[user] + rows.history_end, counts)
    seen = np.repeat(rows.history_end, counts)
    column = np.arange(length)
    place = np.where(column < seen[:, None], last[:, None] - 1 - column, -1)
    history = np.where(place >= 0, rows.history.ids[:, place], 0)
    return history.astype(np.int64), rows.candidates.ids.astype(np.int64)


def zipf_share(batches: Sequence[RequestBatch]) -> float:
    """The share of different items among all items that behaviors and candidates of the batches look up."""
    found = [np.unique(batch.features[ITEM].values().numpy()).size for batch in batches]
    return sum(found) / sum(batch.behaviors + batch.candidates for batch in batches)
