"""From a sequence log to steps: the same global order of blocks on every rank, whatever the world size.

Row groups are shuffled by (seed, epoch) and read some at a time, which is a place; blocks are shuffled
within places. The stream of blocks is cut into steps by cost, and each step's blocks are dealt to the
ranks. The plan needs lengths only, so every rank computes the same one: all end an epoch together, no
block is dropped or read twice, and a position is one number (blocks consumed in this epoch) that means
the same at another world size or number of workers. What came before it need not be planned again, since
a cursor says in which place it lies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import repeat

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.errors import ConfigError, DataError
from trainer.config.sections import DataConfig
from trainer.config.tasks import Task
from trainer.data.batch import Movable, RequestBatch
from trainer.data.blocks import (
    Block,
    LazyRows,
    WindowedRows,
    cut_blocks,
    deal,
    decoders_needed,
    decoders_of,
    most_decoders,
    with_windows,
)
from trainer.data.collate import collate
from trainer.data.cursor import Cursor
from trainer.data.domain_filter import DomainFilter, candidates_by_domain
from trainer.data.files import RowGroup, check_files, find_bad, without_bad
from trainer.data.prefetch import Closable, Prefetcher
from trainer.data.row_group import read_footer
from trainer.data.rows import Columns, PlanRows, read_plan, read_rows
from trainer.data.sample import Sample
from trainer.data.similarity.encoding import similarity_features
from trainer.data.similarity.loading import open_similarities
from trainer.data.similarity.similarity import keys_of
from trainer.data.similarity.vectors import Vectors
from trainer.log.schema import LogManifest, read_manifest
from trainer.storage import is_remote
from trainer.storage.objects import in_parallel


@dataclass(frozen=True)
class Step(Movable):
    """One rank's part of a step, which moves to the device as a whole.

    Attributes:
        batch: what this rank computes.
        counted: False where the step has no block for this rank: it then repeats a block of another one, so
            that collectives match, and its loss and scores count for nothing.
        after: the cursor once the step is done.
        last: it is the last one of its epoch.
        sources: the row groups that the batch came from.
        shares: candidates of each rank, 0 where its part does not count; empty where there is one rank.
        new_rows: of each feature whose ids come and go, the rows that this step gave to new ids on any rank;
            they begin anew before the step's lookup.
    """

    batch: RequestBatch
    counted: bool
    after: Cursor
    last: bool = False
    sources: tuple[RowGroup, ...] = ()
    shares: tuple[int, ...] = ()
    new_rows: Mapping[str, npt.NDArray[np.int64]] = field(default_factory=dict)

    # TorchRec's pipelines read the ids of a later step from what they carry, by the names of the attributes
    # that the model's forward pass reads them from.
    @property
    def features(self) -> KeyedJaggedTensor:
        return self.batch.features

    @property
    def context(self) -> KeyedJaggedTensor | None:
        return self.batch.context


class SequenceLogReader:
    """Reads one split of a sequence log.

    Args:
        config: windows, block and batch sizes.
        split: `train`, `validation` or `test`.
        rows: feature of tables -> their rows; ids outside raise DataError. None reads all of the log.
        tasks: of the run, whose labels are read; None means every label of the log.
        rank, world_size: this reader's share.
        seed: of the shuffle; None reads in stored order.
        share: sums an array over all ranks; needed with several ranks where bad row groups are skipped.
        together: a context that all ranks leave together: each rank checks files of its own in it, and some
            take longer than others.
        prepare: changes every batch last, in the thread that read it where `config.prefetch` is set. Its
            errors reach the consumer as those of reading do.
        limit: about so many candidates are read at most, see `trainer.data.sample`; 0 = the whole split.
        own_row_groups: what `data.sharding = "auto"` means: each rank decodes row groups of its own where
            that spreads well; else every rank all of them. The same on all ranks.
        manifest: says which splits there are, and which files of the log's folder they have; None: the one of
            that folder.
        vectors: those of `data.vectors`, by name; None: they are read from their files.

    Attributes:
        vectors: what was found in these files; empty where they were given, or where nothing compares them.
        row_groups: that are read; candidates: of the whole split, or of its chosen domains; sample: what is
            read of them, None = all; expected: the candidates that are read, about.

    Raises:
        DataError: the log, its manifest or one of its files is missing or malformed.
        ConfigError: the hard search names a feature that it cannot match on, or `data.domain` one that is no
            candidate's domain.
    """

    def __init__(
        self,
        config: DataConfig,
        split: str,
        rows: dict[str, int] | None,
        *,
        tasks: Sequence[Task] | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
        share: Callable[[Sequence[int]], list[int]] = list,
        together: Callable[[], AbstractContextManager[None]] = nullcontext,
        prepare: Callable[[RequestBatch], RequestBatch] | None = None,
        limit: int = 0,
        own_row_groups: bool = False,
        manifest: LogManifest | None = None,
        vectors: Mapping[str, Vectors] | None = None,
    ) -> None:
        self._prepare = prepare
        self.config, self.split = config, split
        self.seed = seed if config.order == "shuffled" else None
        self.rank, self.world_size = rank, world_size
        self._own_row_groups = own_row_groups
        manifest = manifest or read_manifest(config.log)
        self.columns = _columns(manifest, rows, tasks, config)
        with together() if config.similarity else nullcontext():
            self.vectors, similarities = open_similarities(config, manifest, vectors)
        self.columns = replace(self.columns, similarities=similarities)
        by_digest = not is_remote(config.log) if config.verify == "auto" else config.verify
        whole = by_digest and config.on_bad == "fail"
        with together():
            self.row_groups = check_files(
                *(config.log, manifest, split, (rank, world_size) if whole else None),
                sized=bool(config.verify) and config.on_bad == "fail",
            )
        self.skipped: list[DataError] = []
        left_out: list[RowGroup] = []
        if config.on_bad == "skip":
            every = self.row_groups
            with together():
                bad, self.skipped = find_bad(every, self.columns, (rank, world_size))
            self.row_groups = without_bad(every, share(bad), config.max_bad, self.skipped)
            # As all ranks have agreed; `skipped` are those alone that this rank has tried.
            kept = set(self.row_groups)
            left_out = [place for place in every if place not in kept]
        self.candidates = manifest.splits[split].candidates
        if not self.candidates:
            raise DataError(f"no request of split {split!r} has a candidate", file=config.log)
        files = [(entry.path, entry.rows, entry.sha256) for entry in manifest.splits[split].files]
        rows_read = [files, [(place.file.name, place.row_group) for place in left_out]]
        # Digest of the split's rows and their order: what a position inside an epoch refers to.
        self.order = hashlib.sha256(json.dumps(rows_read).encode()).hexdigest()
        self._every_row_group, self._order = self.row_groups, self.order
        self._limit, self._share = limit, share
        self._filter: DomainFilter | None = None
        self._first_epoch = 0
        self._take()

    def _take(self) -> None:
        """Set what follows from the candidates that there are: the sample of them, and the plan's digest."""
        config, every = self.config, self._every_row_group
        self.sample = Sample.of(self.candidates, len(every), self._limit)
        self.expected = self.candidates if self.sample is None else self._limit
        self.row_groups = every if self.sample is None else self.sample.places(every)
        # Digest of all that decides which blocks each place holds, and in what order.
        cut = [
            config.history_length,
            config.requests_per_block,
            config.block_limit,
            config.shuffle_row_groups,
            *([self._first_epoch] if self._first_epoch else []),
        ]
        self.plan = hashlib.sha256(json.dumps([self.order, self.seed, *cut]).encode()).hexdigest()[:16]

    @cached_property
    def by_domain(self) -> Mapping[int, int]:
        """Id of a domain -> the split's candidates of it, where it has any, ascending; collective.

        The domain's column of the whole split is read once, by all ranks together.
        """
        assert self.columns.domain is not None
        rank = self.rank, self.world_size
        return candidates_by_domain(self._every_row_group, self.columns.domain, rank, self._share)

    def of_domains(self, domains: Collection[int], first_epoch: int = 0) -> SequenceLogReader:
        """A reader of the candidates of these domains alone, see `trainer.data.domain_filter`; collective.

        Args:
            first_epoch: the epoch whose order is that of epoch 0. So what a phase of one domain reads does
                not depend on how many passes came before.

        Raises:
            ConfigError: candidates have no domain, or the split has no candidate of one of these.
        """
        column, names = self.columns.domain, ", ".join(map(str, sorted(domains)))
        if column is None:
            problem = "name the feature that says a candidate's domain in data.domain"
            raise ConfigError(f"domains = [{names}]: candidates have no domain; {problem}")
        for domain in sorted(domains):
            if domain not in self.by_domain:
                known = f"those of domains {', '.join(map(str, self.by_domain))}"
                raise ConfigError(
                    f"domains = [{names}]: no candidate of the split {self.split} has "
                    f"{self.config.domain} = {domain}; there are {known}"
                )
        chosen = copy(self)
        chosen._filter = DomainFilter(column, tuple(sorted(set(domains))))
        chosen._first_epoch = first_epoch
        chosen.candidates = sum(self.by_domain[domain] for domain in chosen._filter.domains)
        chosen.order = hashlib.sha256(f"{self._order} {chosen._filter.domains}".encode()).hexdigest()
        chosen._take()
        return chosen

    def steps(self, cursor: Cursor = Cursor()) -> Closable[Step]:  # noqa: B008 - frozen
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
            for blocks, after, last in self._global_steps(cursor, pool):
                costs, owners = [block.cost for block in blocks], [block.owners for block in blocks]
                ranks = deal(costs, self.world_size, owners)
                mine = [block for block, rank in zip(blocks, ranks, strict=True) if rank == self.rank]
                shares = [0] * self.world_size
                for block, rank in zip(blocks, ranks, strict=True):
                    shares[rank] += block.candidates
                used = mine or blocks[:1]
                batch = collate(used, self.config, self.columns, sum(shares))
                if self._prepare is not None:
                    batch = self._prepare(batch)
                sources = tuple({block.rows.place: None for block in used})
                yield Step(batch, bool(mine), after, last, sources, tuple(shares))

    def _global_steps(
        self, cursor: Cursor, pool: Executor | None
    ) -> Iterator[tuple[list[Block], Cursor, bool]]:
        """Cut the stream of blocks into steps of all ranks: blocks, cursor after them, the last ones."""
        pending: list[Block] = []
        candidates, behaviors, consumed, place = 0, 0, cursor.blocks, cursor
        most = self.config.batch_behaviors
        for place, block in self._blocks(cursor, pool):
            full = candidates >= self.config.batch_candidates or (most and behaviors + block.behaviors > most)
            if pending and full:
                yield pending, replace(place, blocks=consumed), False
                pending, candidates, behaviors = [], 0, 0
            pending.append(block)
            consumed += 1
            candidates, behaviors = candidates + block.candidates, behaviors + block.behaviors
        if pending:
            yield pending, replace(place, blocks=consumed), True

    def _blocks(self, cursor: Cursor, pool: Executor | None) -> Iterator[tuple[Cursor, Block]]:
        """Blocks from the cursor on, in order, each with the position where its place begins.

        The next place is decoded while this one is consumed.
        """
        ready: list[Block] = []
        size, places = self.config.shuffle_row_groups, self.row_groups
        epoch = cursor.epoch - self._first_epoch
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(places))
            places = [places[i] for i in order]
        first, consumed = (cursor.place, cursor.before) if cursor.plan == self.plan else (0, 0)
        at = cursor
        for number in range(first, -(-len(places) // size)):
            blocks, decoders = self._open(places[number * size : (number + 1) * size], epoch, number)
            before = consumed
            consumed, skipped = before + len(blocks), max(0, cursor.blocks - before)
            if skipped >= len(blocks):
                continue
            if pool is not None:
                for decoder in decoders:
                    decoder.start(pool)
            yield from zip(repeat(at), ready)
            at = Cursor(cursor.window, cursor.epoch, before, number, before, self.plan)
            ready = blocks[skipped:]
            # Drop these references now, or the place stays in memory one place longer.
            del blocks, decoders
        yield from zip(repeat(at), ready)

    def _open(self, places: list[RowGroup], epoch: int, number: int) -> tuple[list[Block], list[LazyRows]]:
        """Blocks of a place in this epoch's order, and decoders of the row groups that this rank needs."""
        # Small requests, of which a store answers many in the time of one.
        look = in_parallel if is_remote(self.config.log) else map
        files = list(dict.fromkeys(place.file for place in places))
        footers = dict(zip(files, look(read_footer, files), strict=True))
        plans = list(look(lambda place: self._plan(place, footers[place.file]), places))
        decoders = [LazyRows(place, partial(self._decode, place, footers[place.file])) for place in places]
        cut = [
            cut_blocks(plan, (), decoder, self.config) for plan, decoder in zip(plans, decoders, strict=True)
        ]
        owners: list[tuple[int, ...]] = [()] * len(places)
        if each := self._decoders([block for part in cut for block in part]):
            owners = decoders_of([plan.cost for plan in plans], self.world_size, each)
        blocks: list[Block] = []
        for part, ranks in zip(cut, owners, strict=True):
            blocks += [block._replace(owners=ranks) for block in part] if ranks else part
        # Of row groups without a block, nothing is decoded.
        used = {id(block.rows) for block in blocks}
        decoders = [
            each for each, ranks in zip(decoders, owners, strict=True) if self.rank in ranks or not ranks
        ]
        decoders = [each for each in decoders if id(each) in used]
        if self.seed is not None:
            order = np.random.default_rng([self.seed, epoch, number]).permutation(len(blocks))
            blocks = [blocks[i] for i in order.tolist()]
        return blocks, decoders

    def _plan(self, place: RowGroup, footer: pq.FileMetaData) -> PlanRows:
        column = None if self._filter is None else self._filter.column
        plan = read_plan(place.file, place.row_group, footer, self.sample is not None, column)
        if self._filter is not None:
            plan = self._filter.of_plan(plan)
        return plan if self.sample is None else self.sample.of_plan(plan)

    def _decoders(self, blocks: Sequence[Block]) -> int:
        """How many ranks decode each row group of a place that has these blocks; 0: all."""
        sharding = self.config.sharding
        # In stored order a step's blocks lie in one or two row groups: their owners would do all the work.
        apart = self._own_row_groups and self.seed is not None
        if self.world_size == 1 or sharding == "steps" or (sharding == "auto" and not apart):
            return 0
        needed = decoders_needed(blocks, self.config, self.world_size)
        return needed or (most_decoders(self.world_size) if sharding == "row_groups" else 0)

    def _decode(self, place: RowGroup, footer: pq.FileMetaData) -> WindowedRows:
        rows = read_rows(place.file, place.row_group, self.columns, footer)
        if self._filter is not None:
            rows = self._filter.of_rows(rows)
        return with_windows(rows, self.config.history_length, self.config.ingestion_delay)


def _columns(
    manifest: LogManifest, rows: dict[str, int] | None, tasks: Sequence[Task] | None, config: DataConfig
) -> Columns:
    search = config.search
    wanted = [*search.levels, *([search.domain] if search.domain else [])]
    for name in wanted:
        info = manifest.features.get(name)
        needed = "history" if name == search.domain and name not in search.levels else "both"
        if info is None or info.multi or info.encoder or info.side not in ("both", needed):
            raise ConfigError(
                f"data.search names {name!r}, which must be a feature with one id a behavior"
                f"{'' if needed == 'history' else ' and candidate'}; "
                f"the log has {', '.join(manifest.features)}"
            )
    if rows is not None:
        added, known = similarity_features(config), {**manifest.features, **manifest.context}
        rows = {name: count for name, count in rows.items() if name not in added}
        wanted += [name for name in keys_of(config) if name in known and known[name].encoder is None]
        rows = {**{name: known[name].bound for name in wanted}, **rows}
        # The log's order of features, whatever the config's: a batch's keys do not depend on it.
        rows = {name: rows[name] for name in [*manifest.features, *manifest.context, *rows] if name in rows}
    columns = Columns.of(manifest, rows, tasks, config.domain)
    if not config.clusters:
        return columns
    if manifest.clusters is None:
        raise ConfigError(
            f"data.clusters: histories of {config.log} are not clustered; make a log with `tandemrec cluster`"
        )
    return replace(columns, chunk=manifest.clusters.chunk)
