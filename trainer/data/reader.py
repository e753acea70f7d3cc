"""From a sequence log to steps: the same global order of blocks on every rank, whatever the world size.

Row groups are shuffled by (seed, epoch), blocks within windows of row groups; the stream of blocks is cut
into steps by cost, and each step's blocks are dealt to the ranks. The plan needs lengths only, so every rank
computes the same one: all end an epoch together, no block is dropped or read twice, and a position is one
number (blocks consumed in this epoch) that means the same at another world size or number of workers.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache

import numpy as np

from embeddings.errors import ConfigError, DataError
from trainer.config import DataConfig
from trainer.data.batch import RequestBatch
from trainer.data.blocks import Block, BlockLimits, cut_blocks
from trainer.data.collate import collate
from trainer.data.files import RowGroup, check_files, skip_bad
from trainer.data.prefetch import Closable, Prefetcher
from trainer.data.rows import Columns, PlanRows, UserRows, read_plan, read_rows
from trainer.data.schema import LogManifest, read_manifest


@dataclass(frozen=True)
class Cursor:
    """A position in the data: blocks of epoch `epoch` consumed by all ranks together."""

    epoch: int = 0
    blocks: int = 0


@dataclass(frozen=True)
class Step:
    """One rank's part of a step.

    Attributes:
        batch: what this rank computes.
        counted: False where the step has no block for this rank: it then repeats a block of another one, so
            that collectives match, and its loss and scores count for nothing.
        after: the cursor once the step is done.
    """

    batch: RequestBatch
    counted: bool
    after: Cursor


@dataclass(frozen=True)
class _Window:
    """Planned blocks of some row groups, in their order for this epoch; owner of each row group."""

    blocks: list[Block]
    owners: list[int]


class SequenceLogReader:
    """Reads one split of a sequence log.

    Args:
        config: windows, block and batch sizes.
        split: `train`, `validation` or `test`.
        rows: feature -> embedding rows; ids outside raise DataError. None reads all features of the log.
        rank, world_size: this reader's share.
        seed: of the shuffle; None reads in stored order.
        share: sums an array over all ranks; needed with several ranks where bad row groups are skipped.

    Raises:
        DataError: the log, its manifest or one of its files is missing or malformed.
        ConfigError: the hard search names a feature that it cannot match on.
    """

    def __init__(
        self,
        config: DataConfig,
        split: str,
        rows: dict[str, int] | None,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
        share: Callable[[Sequence[int]], list[int]] = list,
    ) -> None:
        self.config, self.split = config, split
        self.seed = seed if config.order == "shuffled" else None
        self.rank, self.world_size = rank, world_size
        manifest = read_manifest(config.log)
        self.columns = _columns(manifest, rows, config)
        whole = config.verify and config.on_bad == "fail"
        self.row_groups = check_files(config.log, manifest, split, (rank, world_size) if whole else None)
        self.skipped: list[DataError] = []
        if config.on_bad == "skip":
            self.row_groups, self.skipped = skip_bad(
                self.row_groups, self.columns, config.max_bad, (rank, world_size), share
            )
        self.candidates = manifest.splits[split].candidates
        if not self.candidates:
            raise DataError(f"no request of split {split!r} has a candidate", file=config.log)
        self._limits = BlockLimits(config.history_length, config.requests_per_block, config.block_limit)

    def steps(self, cursor: Cursor = Cursor()) -> Closable[Step]:
        """The steps of one epoch from `cursor` on, prepared ahead by threads as the config says."""
        steps = self._steps(cursor)
        return Prefetcher(steps, self.config.prefetch) if self.config.prefetch else steps

    def numeric_names(self) -> list[str]:
        """What the columns of `RequestBatch.numeric` are."""
        return [*self.columns.numeric, *self.config.search.count_names]

    def _steps(self, cursor: Cursor) -> Generator[Step, None, None]:
        with ExitStack() as stack:
            pool: Executor | None = None
            if self.config.workers:
                pool = ThreadPoolExecutor(self.config.workers, "decode")
                stack.callback(pool.shutdown, cancel_futures=True)
            for blocks, owners, after in self._plan(cursor, pool):
                mine = [block for block, owner in zip(blocks, owners, strict=True) if owner == self.rank]
                total = sum(block.candidates for block in blocks)
                batch = collate(mine or blocks[:1], self.config, self.columns, total)
                yield Step(batch, bool(mine), after)

    def _plan(self, cursor: Cursor, pool: Executor | None) -> Iterator[tuple[list[Block], list[int], Cursor]]:
        """Cut the stream of blocks into global steps: (blocks, owning ranks, cursor after)."""
        pending: list[tuple[Block, int]] = []
        candidates, behaviors, consumed = 0, 0, 0
        for block, owner in self._blocks(cursor.epoch, pool):
            if consumed < cursor.blocks:
                consumed += 1
                continue
            if pending and self._full(candidates, behaviors + block.behaviors):
                yield self._close(pending, Cursor(cursor.epoch, consumed))
                pending, candidates, behaviors = [], 0, 0
            pending.append((block, owner))
            consumed += 1
            candidates, behaviors = candidates + block.candidates, behaviors + block.behaviors
        if pending:
            yield self._close(pending, Cursor(cursor.epoch, consumed))

    def _full(self, candidates: int, behaviors: int) -> bool:
        limit = self.config.batch_behaviors
        return candidates >= self.config.batch_candidates or bool(limit and behaviors > limit)

    def _close(
        self, pending: list[tuple[Block, int]], after: Cursor
    ) -> tuple[list[Block], list[int], Cursor]:
        blocks = [block for block, _ in pending]
        if self.config.sharding == "row_groups":
            return blocks, [owner for _, owner in pending], after
        return blocks, deal([block.cost for block in blocks], self.world_size), after

    def _blocks(self, epoch: int, pool: Executor | None) -> Iterator[tuple[Block, int]]:
        """All blocks of the epoch in order; the next window is decoded while this one is consumed."""
        ahead: _Window | None = None
        for number, places in enumerate(self._windows(epoch)):
            ready, ahead = ahead, self._open(places, epoch, number, pool)
            if ready is not None:
                yield from _with_owners(ready)
        if ahead is not None:
            yield from _with_owners(ahead)

    def _open(self, places: list[RowGroup], epoch: int, number: int, pool: Executor | None) -> _Window:
        blocks: list[Block] = []
        costs = []
        plans = [read_plan(place.file, place.row_group) for place in places]
        for plan in plans:
            costs.append(int(plan.candidates.sum()) + _longest(plan))
        owners = deal(costs, self.world_size)
        for index, (place, plan) in enumerate(zip(places, plans, strict=True)):
            mine = self.config.sharding == "steps" or owners[index] == self.rank
            rows = self._decoder(place, pool if mine else None)
            blocks += cut_blocks(plan, index, rows, self._limits)
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch, number]).permutation(len(blocks))
            blocks = [blocks[i] for i in order]
        return _Window(blocks, owners)

    def _decoder(self, place: RowGroup, pool: Executor | None) -> Callable[[], UserRows]:
        """Decodes a row group once: ahead in the pool, or on first use where this rank rarely needs it."""
        if pool is None:
            return cache(lambda: read_rows(place.file, place.row_group, self.columns))
        return pool.submit(read_rows, place.file, place.row_group, self.columns).result

    def _windows(self, epoch: int) -> Iterator[list[RowGroup]]:
        places = self.row_groups
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(places))
            places = [places[i] for i in order]
        size = self.config.shuffle_row_groups
        for start in range(0, len(places), size):
            yield places[start : start + size]


def deal(costs: Sequence[int], world_size: int) -> list[int]:
    """Which rank takes what: the costliest goes to the least loaded rank. Deterministic."""
    heap = [(0, rank) for rank in range(world_size)]
    owner = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(heap)
        owner[index] = rank
        heapq.heappush(heap, (load + costs[index], rank))
    return owner


def _with_owners(window: _Window) -> Iterator[tuple[Block, int]]:
    for block in window.blocks:
        yield block, window.owners[block.place]


def _longest(plan: PlanRows) -> int:
    """Behaviors of a row group that some request sees."""
    if not plan.history_end.size:
        return 0
    starts = plan.request_offsets[:-1][np.diff(plan.request_offsets) > 0]
    return int(np.maximum.reduceat(plan.history_end, starts).sum())


def _columns(manifest: LogManifest, rows: dict[str, int] | None, config: DataConfig) -> Columns:
    search = config.search
    wanted = [*search.levels, *([search.domain] if search.domain else [])]
    for name in wanted:
        info = manifest.features.get(name)
        needed = "history" if name == search.domain and name not in search.levels else "both"
        if info is None or info.multi or info.side not in ("both", needed):
            raise ConfigError(
                f"data.search names {name!r}, which must be a feature with one id a behavior"
                f"{'' if needed == 'history' else ' and candidate'}; "
                f"the log has {', '.join(manifest.features)}"
            )
    if rows is not None:
        rows = {**{name: manifest.features[name].rows for name in wanted}, **rows}
        # The log's order of features, whatever the config's: a batch's keys do not depend on it.
        rows = {name: rows[name] for name in [*manifest.features, *manifest.context, *rows] if name in rows}
    return Columns.of(manifest, rows)
