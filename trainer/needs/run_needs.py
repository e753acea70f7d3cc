"""What a run needs at its peak in each of its stages, beside what there is: device, host memory, disk.

The formulae follow from shapes: tables and their state, the copy that a save in the background is written
from, the blocks that everything else is written and read in. What a step takes is an estimate; tests compare
all of them with measured peaks at small size. `tandemrec plan` prints them for a cluster, and training checks
them before its first step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from embeddings.disk import free_disk, same_disk
from embeddings.errors import ConfigError
from embeddings.groups import TableGroup, TableName
from embeddings.plan.memory import DENSE_COPIES, RankMemory, gigabytes
from embeddings.plan.request import Cluster
from embeddings.plan.tables import Table
from embeddings.plan.traffic import Lookup
from trainer.data.similarity.loading import bytes_held
from trainer.run_config import Config
from trainer.step_size import StepSize, kept_behaviors

# A process with torch, TorchRec and Arrow loaded, and what their threads and allocators keep.
PROCESS = 600_000_000
# What a save, a load and an export hold of tables at a time: some blocks of rows of 64 MB.
BLOCKS = 3 * (1 << 26)
# Of a dense weight in a checkpoint: itself and Adam's two means.
_DENSE_SAVED = 3
# Behaviors of a window from which on, times the width, its keys are slices of the batch and not gathered.
_GATHERED = 1 << 15
# Above this share of what there is, little may be different from the estimate.
_TIGHT = 0.9
FITS, TIGHT, TOO_MUCH = "fits", "too tight", "does not fit"
# The stage of tables that lie in files of `plan.mapped_folder`.
MAPPED = "tables in mapped files"


class TooLittleMemory(ConfigError):
    """A run's tables, with the copy that a save is written from, are more than there is."""


@dataclass(frozen=True)
class Need:
    """Bytes that a stage needs at its peak in one place.

    Attributes:
        stage: what the run does; where: which memory or disk, and whose.
        bytes: needed; room: that there are; None = nobody said.
        parts: what they are for; change: the settings that make it less.
    """

    stage: str
    where: str
    bytes: int
    room: int | None
    change: str
    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Whether it fits; empty where the room is not known."""
        if self.room is None:
            return ""
        if self.bytes > self.room:
            return TOO_MUCH
        return TIGHT if self.bytes > _TIGHT * self.room else FITS

    def line(self) -> str:
        """What does not fit, for people, with what to change."""
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in self.parts.items() if size)
        what = f"{gigabytes(self.bytes)} ({parts})" if parts else gigabytes(self.bytes)
        have = f"there are {gigabytes(self.room or 0)}"
        return f"{self.stage} {self.verdict}: it needs {what} of {self.where}, {have}; {self.change}"


@dataclass(frozen=True)
class Run:
    """A run as its needs follow from it.

    Attributes:
        config: the run's; groups: its table groups; tables: of its model; dense: bytes of its dense weights.
        size: of a step over all ranks; asked: table -> what a step asks of it.
        columns: features and numbers that are read of each behavior and candidate; outputs: numbers that
            the dense layers make of a candidate.
    """

    config: Config
    groups: Mapping[str, TableGroup]
    tables: Mapping[str, Table]
    dense: int
    size: StepSize
    asked: Mapping[str, Lookup]
    columns: int
    outputs: int

    @property
    def checkpoint(self) -> int:
        """Bytes of a whole checkpoint."""
        tables = sum(
            table.weights(table.rows, table.dim) + table.optimizer.state_bytes(table.rows, table.dim)
            for table in self.tables.values()
        )
        return tables + self.dense_saved * self.dense

    @property
    def dense_saved(self) -> int:
        """Copies of the dense weights in a checkpoint: themselves and the states of their optimizers."""
        return _DENSE_SAVED + more_dense(self.config, self.groups.values()).saved


class MoreDense(NamedTuple):
    """Copies of the dense weights that the rule `per_task` keeps besides those of plain Adam.

    Attributes:
        saved: those in a checkpoint; held: all in memory.
    """

    saved: int = 0
    held: int = 0


def more_dense(config: Config, groups: Iterable[TableGroup]) -> MoreDense:
    """At most: some weights belong to one task. `groups`: as they are trained, with their lanes."""
    if "per_task" not in config.rules:
        return MoreDense()
    tasks = max([1, *(len(each.losses) for group in groups for each in group.sets)])
    # Adam's two means, and the mean of squared updates, without the means that no phase needs.
    saved = 3 * tasks - (0 if "summed" in config.rules else 2)
    # A gradient of each task, and the update of one.
    return MoreDense(saved, saved + tasks + 1)


def memory_needs(
    run: Run, held: Sequence[RankMemory], cluster: Cluster, for_tables: int | None = None
) -> list[Need]:
    """Of the fullest rank and node in each stage of training.

    Args:
        held: what each rank has of the tables.
        for_tables: bytes a rank of the disk where tables lie in mapped files; None = not known.
    """
    step, reader = step_bytes(run, cluster), reader_bytes(run)
    copies = DENSE_COPIES + more_dense(run.config, run.groups.values()).held
    dense, local = copies * run.dense, cluster.local_world_size
    host_room, gpus = local * cluster.ddr, cluster.device == "cuda"
    rank = max(range(len(held)), key=lambda each: held[each].total)
    full, bits = held[rank], touched_bytes(run, held)
    needs = []
    fewer = "data.batch_candidates or data.batch_behaviors smaller, more ranks, or groups.<name>.dim smaller"
    if gpus:
        parts = {
            "tables": full.weights + full.optimizer,
            "touched rows": bits,
            "buffers": full.buffers,
            "dense": dense,
            "step": step,
        }
        needs.append(_need("training", f"device memory, rank {rank}", cluster.hbm, f"make {fewer}", parts))
    # The node with most.
    nodes = [held[first : first + local] for first in range(0, len(held), local)]
    of_nodes = [sum(on_host(each, gpus) for each in node) for node in nodes]
    worst = of_nodes.index(max(of_nodes))
    own = {"tables": of_nodes[worst], "processes": local * PROCESS, "reading": local * reader}
    # Twice, for the copies that a save is written from.
    maps = 2 * sum(rules.map_bytes for rules in run.config.id_rules.values())
    own["maps of ids"] = local * maps // cluster.world_size
    if vectors := bytes_held(run.config.data):
        own["pre-trained vectors"] = local * vectors
    if not gpus:
        own |= {"dense": local * dense, "step": local * step, "touched rows": local * bits}
        own["buffers"] = sum(each.buffers for each in nodes[worst])
    if run.config.plan.mapped_folder and not gpus:
        # Their pages are the system's to give back.
        room = None if for_tables is None else local * for_tables
        files, own["tables"] = {"tables": own["tables"]}, 0
        larger = "give plan.mapped_folder a larger disk"
        needs.append(_need(MAPPED, f"disk, node {worst}", room, larger, files))
    where = f"host memory, node {worst}" if len(nodes) > 1 else "host memory"
    less = _less_on_host(own)
    needs.append(_need("training", where, host_room, less, own))
    needs.append(_saving(run, nodes, own, cluster))
    # Rows go from the files to their place a block at a time.
    needs.append(_need("resuming", where, host_room, less, {**own, "step": 0, "blocks": local * BLOCKS}))
    return needs


def _less_on_host(own: Mapping[str, int]) -> str:
    """What makes the largest part of a node's memory smaller."""
    changes = {
        "processes": "give nodes more memory, or fewer ranks",
        "reading": "make data.shuffle_row_groups smaller",
        "step": "make data.batch_candidates or data.batch_behaviors smaller",
        "dense": "give nodes more memory, or make the model's layers narrower",
        "maps of ids": "take more nodes, or make ids.<feature>.capacity smaller",
        "pre-trained vectors": "give nodes fewer ranks, or write vectors of fewer numbers",
    }
    tables = "take more nodes, groups.<name>.dtype fp16, or make groups.<name>.dim smaller"
    return changes.get(max(own, key=lambda part: own[part]), tables)


def _saving(
    run: Run, nodes: Sequence[Sequence[RankMemory]], own: Mapping[str, int], cluster: Cluster
) -> Need:
    mode, local = run.config.checkpoint.mode, cluster.local_world_size
    room, gpus = local * cluster.ddr, cluster.device == "cuda"
    copies = [sum(copy_bytes(each, run.dense, run.dense_saved) for each in node) for node in nodes]
    where = f"host memory, node {copies.index(max(copies))}" if len(nodes) > 1 else "host memory"
    name = "copy of the shards, page-locked" if gpus else "copy of the shards"
    whole = {**own, name: max(copies), "blocks": local * BLOCKS}
    blocks = {**own, "blocks": local * BLOCKS}
    in_blocks = 'set checkpoint.mode = "sync", which needs no copy, or "auto", or take more nodes'
    if mode == "auto":
        # As the first save will find out, with room for what training takes now and then.
        fits = sum(whole.values()) + max(copies) // 10 <= room
        stage = (
            "saving (auto: async)"
            if fits
            else f"saving (auto: sync; no room for {gigabytes(max(copies))} more)"
        )
        return _need(stage, where, room, "see training", whole if fits else blocks)
    if mode == "sync":
        return _need("saving (sync)", where, room, "see training", blocks)
    return _need("saving (async)", where, room, in_blocks, whole)


def export_need(run: Run, cluster: Cluster) -> Need:
    """Of the one process that exports: it holds blocks of rows, and the rows of the requests it compares."""
    compared = sum(
        min(table.weights(table.rows, table.dim), 4 * table.dim * 200_000)
        for name, table in run.tables.items()
        if not _of_lane(name)
    )
    parts = {"process": PROCESS, "dense": 4 * run.dense, "blocks": BLOCKS, "rows compared": compared}
    return _need("export (one process)", "host memory", cluster.ddr * cluster.local_world_size,
                 "export on a larger machine, or with fewer --parity-requests", parts)  # fmt: skip


def disk_needs(
    run: Run, held: Sequence[RankMemory], device: str, out: Path | None, there: int = 0
) -> list[Need]:
    """Of checkpoints in the run's folder.

    Args:
        held: what each rank has of the tables; device: `cpu` or `cuda`.
        out: the run's folder, whose disk is asked for its free bytes; None = nobody said.
        there: bytes of checkpoints that lie there already, and go as new ones come.
    """
    config, one = run.config.checkpoint, run.checkpoint
    room, where = None if out is None else free_disk(out), "disk"
    files = mapped_bytes(run, held, device)
    if files and out is not None and room is not None and _on_disk_of(out, run):
        # Their room is taken before the first save.
        room, where = max(room - files, 0), "disk, beside mapped files"
    every = config.full_every
    best = run.config.train.early_stopping.on or any(phase.stops for phase in run.config.phases)
    kept = config.keep + 1 + best
    if every == 1:
        whole, parts = kept * one, {"": kept * one}
        words = f"{config.keep} kept, one being written"
        words += ", the best" if best else ""
    else:
        # Every delta that is kept needs its base.
        full = 1 + math.ceil(config.keep / every)
        changed = min(one, delta_bytes(run))
        parts = {"full": full * one, "deltas": (kept + every - full) * changed}
        whole, words = sum(parts.values()), f"{full} full, {kept + every - full} with changed rows"
    change = "give --out a larger disk, or make checkpoint.keep smaller"
    needed = max(whole - there, one)
    return [
        _need("one checkpoint", where, room, "give --out a larger disk", {"": one}),
        replace(_need(f"checkpoints ({words})", where, room, change, parts), bytes=needed),
    ]


def mapped_bytes(run: Run, held: Sequence[RankMemory], device: str) -> int:
    """Bytes of the tables of all ranks that lie in files of `plan.mapped_folder`."""
    if device != "cpu" or not run.config.plan.mapped_folder:
        return 0
    return sum(on_host(each, gpus=False) for each in held)


def _on_disk_of(out: Path, run: Run) -> bool:
    """Whether mapped files lie on the disk of the run: then those of all nodes do, which share it."""
    return same_disk(out, Path(run.config.plan.mapped_folder or ""))


def delta_bytes(run: Run) -> int:
    """Bytes of an incremental checkpoint at most: rows that the steps since the one before may touch."""
    steps = max(run.config.checkpoint.every_steps, 1)
    rows = 0
    for name, table in run.tables.items():
        each = table.weights(1, table.dim) + table.optimizer.state_bytes(1, table.dim) + 8
        rows += each * min(table.rows, steps * run.asked[name].ids)
    return rows + run.dense_saved * run.dense


def touched_bytes(run: Run, held: Sequence[RankMemory]) -> int:
    """A bit for each row of the fullest rank, where checkpoints hold the rows that changed."""
    if run.config.checkpoint.full_every == 1:
        return 0
    sizes = [each.weights + each.host_weights for each in held]
    rows = sum(table.rows for table in run.tables.values())
    return int(rows / 8 * max(sizes) / max(sum(sizes), 1))


def on_host(held: RankMemory, gpus: bool) -> int:
    """Bytes of tables in host memory."""
    return held.host if gpus else held.weights + held.optimizer


def _of_lane(table: str) -> bool:
    name = TableName.of(table)
    return name is not None and bool(name.lane)


def copy_bytes(held: RankMemory, dense: int, copies: int = _DENSE_SAVED) -> int:
    """Bytes of a rank's shards, and of the dense weights with all their states: so many copies of them."""
    shards = held.weights + held.optimizer + held.host_weights + held.host_optimizer
    return shards + copies * dense


def step_bytes(run: Run, cluster: Cluster) -> int:
    """What a rank's part of a step takes beside tables and dense weights; an estimate.

    Looked-up vectors and their gradients stay to the end of the step. Stage one holds the keys of each
    request's window and some numbers for each of its columns and candidates; stage two and the head come
    after it, so that the larger of both counts.
    """
    config, ranks = run.config, cluster.world_size
    n, c = (-(-part // ranks) for part in (run.size.behaviors, run.size.candidates))
    r, kept = (
        -(-run.size.requests // ranks),
        -(-kept_behaviors(config.model, run.size, cluster.device) // ranks),
    )
    longest = max((behaviors for behaviors, _ in run.size.blocks), default=1)
    window = min(config.data.history_length, longest)
    widths = {name: group.width for name, group in run.groups.items()}
    # Vectors of lanes are looked up besides.
    looked_up = {name: group.looked_up_width for name, group in run.groups.items()}
    early, late, search, read = set(), set(), 0, 0
    for branch in config.model.all_branches().values():
        roles = branch.roles
        key, value = widths[roles.attention_behavior], widths[roles.representation_behavior]
        early.add(roles.attention_behavior)
        late.add(roles.representation_behavior)
        if branch.searches:
            gathered = 4 * key if window * key < _GATHERED else 0
            search += r * window * (gathered + 24) + 8 * c * window * branch.heads
        columns = branch.k if branch.searches else window
        read += 2 * 4 * c * columns * value
    vectors = (n + c) * sum(looked_up[name] for name in early)
    vectors += (n + c if config.model.lookup == "full" else kept + c) * sum(
        looked_up[name] for name in late - early
    )
    inputs = sum(widths[name] for name in early | late) + run.outputs
    return 2 * 4 * vectors + max(search, read + 3 * 4 * c * inputs)


def reader_bytes(run: Run) -> int:
    """What a rank's reader holds: two windows of row groups, decoded, with 8 bytes a number."""
    return 2 * 8 * run.columns * run.size.window


def check_memory(needs: Sequence[Need]) -> list[str]:
    """What a start says of its needs: a line for each place where they do not fit by an estimate.

    Raises:
        TooLittleMemory: what is no estimate does not fit: tables, and the copy for a save.
    """
    for need in needs:
        certain = {name: size for name, size in need.parts.items() if name.startswith(("tables", "copy"))}
        if need.room is not None and sum(certain.values()) > need.room:
            raise TooLittleMemory(_need(need.stage, need.where, need.room, need.change, certain).line())
    lines: dict[str, str] = {}
    for need in needs:
        if need.verdict == TOO_MUCH:
            # Later stages need what training needs, and more.
            lines.setdefault(need.where, f"warning: {need.line()}")
    return list(lines.values())


def check_disk(needs: Sequence[Need], new: bool) -> list[str]:
    """The same of a run's disk.

    Args:
        new: the run has nothing yet; another may have nothing left to save.

    Raises:
        ConfigError: not one checkpoint fits, of a new run.
    """
    one, kept = needs
    if new and one.verdict == TOO_MUCH:
        raise ConfigError(one.line())
    return [f"warning: {kept.line()}"] if kept.verdict == TOO_MUCH else []


def _need(stage: str, where: str, room: int | None, change: str, parts: Mapping[str, int]) -> Need:
    kept = {name: size for name, size in parts.items() if size and name}
    return Need(stage, where, sum(parts.values()), room, change, kept)
