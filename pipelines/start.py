"""What a training does before its first step; `train --check` does the same, and leaves nothing behind."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from embeddings.agreement import from_every_rank, from_rank_0, unhurried
from embeddings.errors import ConfigError
from embeddings.groups import TableGroup
from embeddings.plan.file import read_plan_file, to_tree
from embeddings.plan.memory import RankMemory, memory_of_ranks
from embeddings.plan.planner import DoesNotFit, check_plan, offline_plan
from embeddings.plan.request import keep_quiet
from pipelines.task_lines import task_lines
from trainer.assemble import (
    ShardedModel,
    build_sharded,
    build_trainable,
    cluster_of,
    count_domains,
    id_bounds,
    plan_request,
    resolve_groups,
    room_for_tables,
    run_of,
)
from trainer.checkpoint import save_load as checkpoint
from trainer.checkpoint.compatible import changed_settings, check_resumable, check_same_order, log_fingerprint
from trainer.checkpoint.dense_start import TaskHeads
from trainer.checkpoint.files import bytes_of_all
from trainer.checkpoint.plain_ids import take_ids
from trainer.checkpoint.same_tasks import check_same_tasks
from trainer.checkpoint.same_vectors import vector_lines
from trainer.checkpoint.warm_start import check_source, fill, open_source
from trainer.config.ids import check_kernels
from trainer.config.places import place_of
from trainer.config.tasks import resolve_tasks
from trainer.data.batch import pinning
from trainer.data.living_ids import Finder, looking_up
from trainer.data.observed import unobserved_lines
from trainer.data.reader import SequenceLogReader, Step
from trainer.data.similarity.encoding import similarity_features
from trainer.data.stream.source import SPLIT
from trainer.log.schema import LogManifest, read_manifest
from trainer.loop.attempts import note_start
from trainer.loop.living import lines_of
from trainer.loop.loop import Trainer
from trainer.loop.phases import Phase, branches_of, check_measured, phases_for, place_of_phase
from trainer.loop.pipeline import kind_for
from trainer.loop.remarks import remarks
from trainer.loop.stage import Supply
from trainer.model.frame import TwoStageModel
from trainer.needs.run_needs import Run, TooLittleMemory, check_disk, check_memory, disk_needs, memory_needs
from trainer.objectives.of_tasks import trained_tasks
from trainer.ranks.process_group import Ranks, sum_counts
from trainer.run_config import Config
from trainer.run_folder import RunFolder, check_writable
from trainer.sealed_folder import remove_folder
from trainer.step_size import step_size
from trainer.update.schedule import schedule_remarks

Say = Callable[[str], None]
Kind = TypeVar("Kind", bound=Trainer)
# What a phase reads that does not say otherwise: split and domains.
_ALL = ("train", ())
# Tables up to this size are built where a configuration is only checked.
_SMALL = 1 << 30


@dataclass(frozen=True)
class Start:
    """A run before its tables are placed.

    Attributes:
        config: the run's config; manifest: of its log; folder: of the run; ranks: this rank's place.
        resume: the checkpoint to go on from; fingerprint: of the log.
        groups: with the rows that the log's ids need; train, validation: this rank's readers; domains: ids
            that phases of each domain are for; readers: of splits that phases have asked for.
    """

    config: Config
    manifest: LogManifest
    folder: RunFolder
    ranks: Ranks
    resume: checkpoint.ResumePoint
    fingerprint: str
    groups: dict[str, TableGroup]
    train: SequenceLogReader
    validation: SequenceLogReader | None
    domains: tuple[int, ...] = ()
    readers: dict[str, SequenceLogReader] = field(default_factory=dict)

    @property
    def heads(self) -> TaskHeads:
        """The tasks that the model gives logits of, and what is theirs."""
        tasks = resolve_tasks(self.config.tasks, self.manifest.tasks)
        return TaskHeads.of(self.config.model, tasks, self.groups)

    def reader(self, phase: Phase, first_epoch: int = 0) -> SequenceLogReader:
        """Of the candidates that a phase reads; collective where they are others than those of `train`.

        Args:
            first_epoch: see `SequenceLogReader.of_domains`.
        """
        split, domains = phase.reads
        if split not in self.readers:
            rows, seed = id_bounds(self.groups, self.config), self.config.train.seed
            whole = self.train
            if split != whole.split:
                whole = open_split(self.config, split, rows, self.ranks, seed=seed)
            self.readers[split] = whole
        whole = self.readers[split]
        return whole.of_domains(domains, first_epoch) if domains else whole

    def trainer(self, sharded: ShardedModel, say: Say, kind: type[Kind]) -> Kind:
        """The model with everything that trains it, still with its first weights; collective."""
        check_kernels(self.config.ids, {each.table: each.kernel for each in sharded.placements})
        for line in lines_of(self.config, self.ranks.world_size, windows=self.train.split == SPLIT):
            say(line)
        plan = to_tree(sharded.plan)
        fresh = partial(_fresh_dense, self.config, self.manifest)
        supply = Supply(sharded.groups, fresh, self.reader, self.domains)
        return kind(
            self.config,
            sharded.model,
            self.train,
            self.validation,
            self.ranks,
            self.folder,
            say,
            self.fingerprint,
            plan,
            supply,
        )

    def disk_lines(self, run: Run, held: Sequence[RankMemory]) -> list[str]:
        """What is to be said of the disk that checkpoints go to, before tables in mapped files take of it.

        Args:
            held: what each rank is to have of the tables.

        Raises:
            ConfigError: a new run could not save once.
        """
        folder, device = self.folder.checkpoints, self.ranks.device.type
        needs = disk_needs(run, held, device, folder, bytes_of_all(folder))
        return check_disk(needs, new=self.resume.path is None)

    def fill(self, trainer: Trainer, scratch: Path, say: Say) -> None:
        """Give a new run the weights that `train.init_from` names, if any; collective."""
        if self.resume.path is not None or not self.config.train.init_from:
            return
        path = place_of("train.init_from", self.config.train.init_from)
        carry = self.config.train.init_optimizer == "carry"
        log, heads = self.config.data.log, self.heads
        with open_source(path, scratch) as source:
            lines: list[str] = []

            def filled(tensors: dict[str, Any]) -> None:
                # Ranks read different rows of large files, some for longer than a collective waits.
                more, of_files = similarity_features(self.config.data), self.config.given_groups
                given = source, log, self.manifest, heads, carry, self.config.id_rules, more, of_files
                every = from_every_rank(lambda: fill(tensors, *given), slow=True)
                lines.extend(every[0])

            trainer.load(filled)
            if (living := trainer.living) is not None:
                ids = source.path, source.manifest.ids
                lines.extend(from_every_rank(lambda: take_ids(*ids, living.stage))[0])
        say("\n".join([f"weights from {path}, step {source.manifest.step:,}", *lines]))


def open_start(
    config: Config,
    out: Path,
    ranks: Ranks,
    say: Say,
    *,
    checking: bool = False,
    manifest: LogManifest | None = None,
) -> Start:
    """Read all that a run is made of, and say what of it is left aside; collective.

    Args:
        checking: leave no trace.
        manifest: of what is read first, where that is a window of a stream; None: all of the log is read.

    Raises:
        TandemError: something of it is missing, damaged, or does not fit together.
    """
    log, folder = read_manifest(config.data.log), RunFolder(out)
    fingerprint = log_fingerprint(log)
    split = "train" if manifest is None else next(iter(manifest.splits))
    manifest = manifest or log
    from_rank_0(lambda: check_writable(out))
    from_rank_0(folder.check_not_ousted)
    resume = checkpoint.find(folder.checkpoints)
    for line in _refused_lines(resume, folder, config.checkpoint.keep):
        say(line)
    if resume.path is not None:
        check_resumable(resume.state, config, fingerprint, manifest.tasks)
        of_tasks = check_same_tasks(resume.state, config, manifest.tasks)
        if changed := [*changed_settings(resume.state, config), *of_tasks]:
            say(f"settings that differ from those of {resume.path.name}: {', '.join(changed)}")
    step = resume.state.get("step", 0)
    note_start(folder, config, step, checking=checking)
    tasks = resolve_tasks(config.tasks, manifest.tasks, manifest.partial)
    # Before files are checked; which domains there are is not known yet.
    phases_for(config, manifest, tasks, domains=(0,))
    groups = resolve_groups(config, manifest)
    trained_tasks(tasks, config.train.objective, count_domains(config, manifest), config.train.mean)
    kind_for(config.train.pipeline, ranks.device)
    rows = id_bounds(groups, config)
    train = open_split(config, split, rows, ranks, seed=config.train.seed, manifest=manifest)
    domains = _domains(config, train)
    phases = phases_for(config, manifest, tasks, domains)
    validation = None
    if manifest.holds("validation"):
        validation = open_split(config, "validation", rows, ranks, limit=config.train.validate_candidates)
    check_measured(phases, validation)
    where = "" if resume.path is None else resume.path.name
    if resume.path is not None and phases[place_of_phase(phases, resume.state, where)].reads == _ALL:
        check_same_order(resume.path, resume.state, train.order, config.data.log)
    for problem in [*train.skipped, *(validation.skipped if validation else [])]:
        print(f"[rank {ranks.rank}] skipped: {problem}", flush=True)
    of_vectors = vector_lines(resume.state, train.vectors, where)
    for line in [*remarks(config, manifest, groups), *of_vectors, *task_lines(config, manifest, train)]:
        say(line)
    if validation is not None and validation.sample is not None:
        drawn = validation.sample.line(validation.expected, validation.candidates)
        say(f"validation: {drawn} (train.validate_candidates = 0 takes all)")
    for line in from_rank_0(lambda: list(unobserved_lines(train, manifest)), slow=True):
        say(line)
    if not config.phases and manifest is log:
        for line in schedule_remarks(config.train, train.candidates, config.data.batch_candidates):
            say(line)
    of_log = config, manifest, folder, ranks, resume, fingerprint, groups, train, validation, domains
    start = Start(*of_log, readers={"train": train})
    # What they name is there.
    _ = [start.reader(each) for phase in phases for each in (phase, *branches_of(phase))]
    return start


def _domains(config: Config, train: SequenceLogReader) -> tuple[int, ...]:
    """The ids that have candidates, where phases of each domain are for those; collective."""
    needed = any(phase.each and not phase.domains for phase in config.phases)
    return tuple(train.by_domain) if needed else ()


def _fresh_dense(config: Config, manifest: LogManifest, seed: int) -> dict[str, torch.Tensor]:
    """The dense weights and buffers that a new model begins with, by name; its tables take no memory."""
    train = config.train.model_copy(update={"seed": seed})
    model, _ = build_trainable(config.model_copy(update={"train": train}), manifest, torch.device("meta"))
    return model.dense_tensors()


def _refused_lines(resume: checkpoint.ResumePoint, folder: RunFolder, keep: int) -> list[str]:
    """What was found of damaged checkpoints, and what becomes of them."""
    stays = (
        f"what was refused stays in {folder.checkpoints} and does not count for checkpoint.keep; it is "
        f"deleted once {keep} newer checkpoints are saved, or by you"
    )
    return [*resume.lines, stays] if resume.refused else []


def try_out(start: Start, say: Say) -> None:
    """Do what is left before a first step, short of taking it; collective.

    Tables of more than a gigabyte are planned and not built. If a check runs on one rank, tables that need
    more ranks are reported and are no error, since a check comes before the ranks of a training are there.

    Raises:
        TandemError: training would raise it.
    """
    if start.ranks.speaks:
        start.folder.check_free()
    built = build_trainable(start.config, start.manifest, torch.device("meta"))
    size = sum(4 * table.rows * table.dim for group in built[1].values() for table in group.all_tables)
    _check_plan(start, built, say)
    if size <= _SMALL:
        _build(start)
    else:
        say(f"tables of {size / 1e9:,.1f} GB were planned, not built")
        source = start.config.train.init_from
        if source and start.resume.path is None:
            place, ids = place_of("train.init_from", source), start.config.id_rules
            given = start.config.given_groups
            from_rank_0(lambda: check_source(built[0], start.heads, place, ids, given))
    if start.validation is not None:
        _first(start.validation)
    if start.manifest.holds("test"):
        _first(open_split(start.config, "test", id_bounds(start.groups, start.config), start.ranks))


def _check_plan(start: Start, built: tuple[TwoStageModel, dict[str, TableGroup]], say: Say) -> None:
    """Whether the tables have a place; a plan from a file is checked for the ranks that it was made for."""
    config, ranks = start.config, start.ranks
    memory, size = cluster_of(ranks), step_size(config.data, start.manifest)
    cluster = room_for_tables(memory, config)
    if config.plan.file:
        file = place_of("plan.file", config.plan.file)
        saved = read_plan_file(file)
        if ranks.world_size == 1:
            places = saved.world_size, saved.local_world_size
            cluster = replace(cluster, device=saved.device, world_size=places[0], local_world_size=places[1])
            say(f"{file} is for {places[0]} rank(s) on {saved.device}")
        check_plan(saved, plan_request(config, start.manifest, built, cluster, size), str(file))
        return

    def problem() -> str:
        try:
            request = plan_request(config, start.manifest, built, cluster, size)
            found = offline_plan(request)
            held = memory_of_ranks(found.options, found.tables, cluster.world_size, cluster.device)
            run = run_of(config, start.manifest, request, size)
            lines = check_memory(memory_needs(run, held, memory, cluster.ddr))
            return "\n".join([*lines, *start.disk_lines(run, held)])
        except ConfigError as error:
            if ranks.world_size > 1 or not isinstance(error, (DoesNotFit, TooLittleMemory)):
                raise
            return f"{error}; more ranks may hold them, see `tandemrec plan`"

    if line := from_rank_0(problem):
        say(line)


def _build(start: Start) -> None:
    """The model with its weights, and its answer to a first batch."""
    # Rules that suit the ranks of a plan from a file, such as caches of GPUs, may be none for these.
    other = {"file": "", "tables": {}} if start.config.plan.file else {}
    own = start.config.plan.model_copy(update=other)
    config = start.config.model_copy(update={"plan": own})
    former = start.resume.former_plan
    new = start.resume.path is None
    sharded = build_sharded(config, start.manifest, start.ranks, training=True, former=former, first_rows=new)
    trainer = start.trainer(sharded, keep_quiet, Trainer)
    trainer.resume(start.resume)
    scratch = Path(from_rank_0(tempfile.mkdtemp))
    try:
        start.fill(trainer, scratch / "init.tmp", keep_quiet)
    finally:
        if start.ranks.speaks:
            remove_folder(scratch)
    step = _first(start.train)
    if trainer.living is not None:
        (step,) = trainer.living.looked_up([step])
    with torch.no_grad():
        sharded.model.eval()(step.batch.to(start.ranks.device))


def _first(reader: SequenceLogReader) -> Step:
    """The first step of a split, read and checked."""
    with closing(reader.steps()) as steps:
        return next(steps)


def open_split(
    config: Config,
    split: str,
    rows: dict[str, int],
    ranks: Ranks,
    seed: int | None = None,
    limit: int = 0,
    domains: Collection[int] = (),
    finders: Mapping[str, Finder] | None = None,
    manifest: LogManifest | None = None,
) -> SequenceLogReader:
    """This rank's reader of a split; shuffled where a seed is given. Collective.

    Where features' ids come and go, its batches hold rows if `finders` are given. If not they hold raw ids,
    for `trainer.loop.living`.

    Args:
        limit: about so many candidates are read at most; 0 = the whole split.
        domains: whose candidates are read; none = all. Of one reader of the whole split, `of_domains` makes
            others without checking its files again.
        finders: what knows the rows of ids that come and go.
        manifest: see `SequenceLogReader`.
    """
    reader = SequenceLogReader(
        config.data,
        split,
        rows,
        tasks=resolve_tasks(config.tasks, read_manifest(config.data.log).tasks),
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=seed,
        share=sum_counts,
        together=unhurried,
        prepare=looking_up(finders, pinning(ranks.device)) if finders or not config.ids else None,
        limit=limit,
        own_row_groups=ranks.device.type == "cuda",
        manifest=manifest,
    )
    return reader.of_domains(domains) if domains else reader
