"""From a sequence log to steps: the same global order of blocks on every rank, whatever the world size.

Row groups are shuffled by (seed, epoch), blocks within windows of row groups; the stream of blocks is cut
into steps by candidate count, and each step's blocks are dealt to the ranks by cost. Every rank computes
the same plan, so all end an epoch together, no block is dropped or read twice, and a position is one number
(blocks consumed in this epoch) that means the same at another world size.
"""

from __future__ import annotations

import heapq
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from embeddings.errors import DataError
from trainer.config import DataConfig
from trainer.data.batch import RequestBatch
from trainer.data.blocks import Block, collate, cut_blocks
from trainer.data.rows import PARQUET_ERRORS, Columns, read_rows
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
        counted: False where the step has fewer blocks than ranks: this rank then repeats a block of another
            one, so that collectives match, and its loss and scores count for nothing.
        after: the cursor once the step is done.
    """

    batch: RequestBatch
    counted: bool
    after: Cursor


class SequenceLogReader:
    """Reads one split of a sequence log.

    Args:
        config: windows, block and batch sizes.
        split: `train`, `validation` or `test`.
        rank, world_size: this reader's share.
        rows: feature -> embedding rows; ids outside raise DataError.
        seed: of the shuffle; None reads in stored order.

    Raises:
        DataError: the log, its manifest or one of its files is missing or malformed.
    """

    def __init__(
        self,
        config: DataConfig,
        split: str,
        rows: dict[str, int],
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
    ) -> None:
        self.config, self.split, self.seed = config, split, seed
        self.rank, self.world_size = rank, world_size
        manifest = read_manifest(config.log)
        self.columns = Columns(rows, manifest.tasks)
        self.row_groups = _row_groups(config.log, manifest, split)
        self.candidates = manifest.splits[split].candidates

    def steps(self, cursor: Cursor = Cursor()) -> Iterator[Step]:
        """The steps of one epoch from `cursor` on, prepared ahead by a thread if config.prefetch > 0."""
        steps = self._steps(cursor)
        return Prefetcher(steps, self.config.prefetch) if self.config.prefetch else steps

    def _steps(self, cursor: Cursor) -> Iterator[Step]:
        for blocks, after in self._plan(cursor):
            mine = deal(blocks, self.world_size)[self.rank]
            total = sum(block.candidates for block in blocks)
            batch = collate(mine or blocks[:1], self.config.history_length, total)
            yield Step(batch, bool(mine), after)

    def _plan(self, cursor: Cursor) -> Iterator[tuple[list[Block], Cursor]]:
        """Cut the stream of blocks into global steps of about `batch_candidates` candidates."""
        pending: list[Block] = []
        candidates, consumed = 0, 0
        for block in self._blocks(cursor.epoch):
            consumed += 1
            if consumed <= cursor.blocks:
                continue
            pending.append(block)
            candidates += block.candidates
            if candidates >= self.config.batch_candidates:
                yield pending, Cursor(cursor.epoch, consumed)
                pending, candidates = [], 0
        if pending:
            yield pending, Cursor(cursor.epoch, consumed)

    def _blocks(self, epoch: int) -> Iterator[Block]:
        config = self.config
        for window, places in enumerate(self._windows(epoch)):
            blocks: list[Block] = []
            for file, row_group in places:
                rows = read_rows(file, row_group, self.columns)
                blocks += cut_blocks(
                    rows,
                    config.history_length,
                    config.requests_per_block,
                    config.block_limit,
                    config.ingestion_delay,
                )
            if self.seed is not None:
                order = np.random.default_rng([self.seed, epoch, window]).permutation(len(blocks))
                blocks = [blocks[i] for i in order]
            yield from blocks

    def _windows(self, epoch: int) -> Iterator[list[tuple[Path, int]]]:
        places = self.row_groups
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(places))
            places = [places[i] for i in order]
        size = self.config.shuffle_row_groups
        for start in range(0, len(places), size):
            yield places[start : start + size]


def deal(blocks: list[Block], world_size: int) -> list[list[Block]]:
    """Share a step's blocks among ranks: the costliest block goes to the least loaded rank.

    Deterministic, and within a rank the blocks keep their order.
    """
    if world_size == 1:
        return [blocks]
    heap = [(0, rank) for rank in range(world_size)]
    owner = [0] * len(blocks)
    for index in sorted(range(len(blocks)), key=lambda i: (-blocks[i].cost, i)):
        load, rank = heapq.heappop(heap)
        owner[index] = rank
        heapq.heappush(heap, (load + blocks[index].cost, rank))
    return [
        [block for block, r in zip(blocks, owner, strict=True) if r == rank] for rank in range(world_size)
    ]


def _row_groups(log: Path, manifest: LogManifest, split: str) -> list[tuple[Path, int]]:
    if split not in manifest.splits:
        raise DataError(f"the log has no split {split!r}; it has {', '.join(manifest.splits)}", file=log)
    places: list[tuple[Path, int]] = []
    for entry in manifest.splits[split].files:
        file = log / entry.path
        try:
            with pq.ParquetFile(file) as parquet:
                if parquet.metadata.num_rows != entry.rows:
                    raise DataError(
                        f"holds {parquet.metadata.num_rows} rows, the manifest says {entry.rows}; "
                        "ingest the events again",
                        file=file,
                    )
                places += [(file, group) for group in range(parquet.metadata.num_row_groups)]
        except FileNotFoundError:
            raise DataError("named in the manifest but missing; ingest again", file=file) from None
        except PARQUET_ERRORS as error:
            raise DataError(f"unreadable: {error}", file=file) from None
    if not places:
        raise DataError(f"split {split!r} of this log is empty", file=log)
    return places


class Prefetcher(Iterator[Step]):
    """Runs an iterator in a thread, at most `depth` items ahead; its exceptions surface in the consumer."""

    def __init__(self, steps: Iterator[Step], depth: int) -> None:
        self._queue: queue.Queue[Step | BaseException | None] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(steps,), name="reader", daemon=True)
        self._thread.start()

    def _run(self, steps: Iterator[Step]) -> None:
        try:
            for step in steps:
                if not self._put(step):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Step | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> Step:
        item = self._queue.get()
        if item is None or isinstance(item, BaseException):
            self._stop.set()
            self._queue.put(None)
            if isinstance(item, BaseException):
                raise item
            raise StopIteration
        return item

    def close(self) -> None:
        """Stop the thread; safe to call more than once."""
        self._stop.set()
        self._thread.join()
