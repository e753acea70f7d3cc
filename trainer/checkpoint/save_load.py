"""Checkpoints for resuming: written whole or not at all, and never loaded unverified.

A checkpoint (see `trainer.checkpoint.files`) is written to `step-########.tmp-<id>` by all ranks, each
hashing its own files while it writes them; rank 0 adds the manifest, and everything is synced before it is
renamed. Loading verifies every digest first: DCP itself reads flipped bits without complaint, and unpickles
its metadata. A manifest stops corruption, not somebody who can rewrite it: checkpoints are trusted input,
snapshots are what may come from elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from embeddings.agreement import Group, from_every_rank, from_rank_0
from embeddings.disk import free_disk
from embeddings.errors import CheckpointError
from embeddings.lookup.shards import local_shards, tensors_of
from trainer.assemble import FormerPlan
from trainer.checkpoint import files
from trainer.checkpoint.chain import ChainReader, base_of
from trainer.checkpoint.delta import Delta, delta_name, write_rows
from trainer.checkpoint.files import Entries, read_state, verify
from trainer.checkpoint.fork_files import branch_of
from trainer.checkpoint.row_blocks import BlockPlanner
from trainer.checkpoint.writer import HashedWriter
from trainer.sealed_folder import raise_of_store, remove_folder

__all__ = ["ResumePoint", "find", "find_to_use", "load_tensors", "read_state", "save", "verify"]

Result = TypeVar("Result")
# Writes and syncs more files of a rank into the folder of a save, and gives their manifest entries. It may be
# called by a thread while training goes on.
Beside = Callable[[Path, int], Entries]


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Any],
    state: Mapping[str, Any],
    keep: int,
    best: int = -1,
    group: Group = None,
    delta: Delta | None = None,
    refused: Collection[str] = (),
    besides: Sequence[Beside] = (),
) -> Path:
    """Write one checkpoint; collective over all ranks.

    Args:
        folder: the run's `checkpoints` folder.
        step: steps done.
        tensors: state dict for DCP (model and optimizers).
        state: JSON-able rank-independent state.
        keep: newest checkpoints to keep; older ones are deleted after the new one is in place.
        best: the step of one that stays besides; -1 = none.
        group: that the ranks talk through; a save in a thread needs one that nobody else uses.
        delta: the touched rows that are written instead of whole tables, which `tensors` are without.
        refused: names of checkpoints that were found to be of no use, and do not count as kept.
        besides: each writes files of this rank besides, see `Beside`.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; nothing older is touched, and
            what was written is removed.
    """
    part, done, damage = from_rank_0(partial(_new_part, folder, step), group)
    if done:
        return part
    final = files.final_of(part)
    of_this_save = partial(_of_save, final, group)
    try:
        from_rank_0(of_this_save(lambda: files.prepare(folder, part)), group)
        written = from_every_rank(of_this_save(lambda: _write(part, tensors, group, delta, besides)), group)
        whole = state if delta is None else {**state, "base": delta.entry()}
        from_rank_0(of_this_save(lambda: _finish(part, final, written, whole, damage)), group)
    except CheckpointError:
        if dist.get_rank(group) == 0:
            remove_folder(part)
        raise
    others = set(refused) - {final.name}
    # The save is done, whatever cannot be deleted.
    from_rank_0(lambda: files.retire(folder, final, keep, best, others), group)
    return final


def _new_part(folder: Path, step: int) -> tuple[Path, bool, str]:
    """Where a save goes: (folder to write, False, what is wrong with this step's checkpoint that is there).

    Where that one is good: (it, True, "").
    """
    damage = ""
    for there in files.of_step(folder, step):
        try:
            _verify_chain(there, alone=True)
        except CheckpointError as error:
            damage = str(error)
        else:
            return there, True, ""
    return files.new_part(folder, step), False, damage


def _of_save(final: Path, group: Group, action: Callable[[], Result]) -> Callable[[], Result]:
    """An action with its failure as that of a save."""

    def attempt() -> Result:
        try:
            return action()
        except Exception as error:
            reason = error.problem if isinstance(error, CheckpointError) else _reason(error)
            rank = dist.get_rank(group)
            problem = f"rank {rank} could not save: {reason}; older checkpoints are untouched"
            raise CheckpointError(final, problem) from None

    return attempt


@dataclass(frozen=True)
class ResumePoint:
    """What is there to resume from.

    Attributes:
        path: the newest checkpoint that verifies, None where there is none at all.
        state: its rank-independent state; refused: why newer ones were refused.
        refused_names: of their folders.
    """

    path: Path | None
    state: dict[str, Any]
    refused: list[str]
    refused_names: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """What is to be said of those that were refused, and of where this one stands."""
        name = self.path.name if self.path is not None else ""
        lines = [f"refused checkpoint: {reason}; using {name}" for reason in self.refused]
        if branch := branch_of(self.state):
            what = "its weights are those of this branch alone, before the merge"
            lines.append(f"checkpoint {name} stands inside the branch {branch}: {what}")
        return lines

    @property
    def former_plan(self) -> FormerPlan | None:
        """How the tables of the checkpoint lay; None where there is no checkpoint."""
        if self.path is None:
            return None
        return FormerPlan(self.path.name, self.state["config"], self.state.get("plan"))


def find(folder: Path, alone: bool = False) -> ResumePoint:
    """Look for the newest good checkpoint; collective, each rank verifies its share of the files.

    Args:
        alone: this rank looks by itself, and the others do not.

    Raises:
        CheckpointError: there are checkpoints, but none verifies.
    """
    refused: dict[str, str] = {}
    seen: dict[Path, CheckpointError | None] = {}
    for path in _answer(alone, partial(files.checkpoints, folder)):
        try:
            _verify_chain(path, alone, seen)
        except CheckpointError as error:
            refused[path.name] = str(error)
        else:
            state = _answer(alone, partial(read_state, path))
            return ResumePoint(path, state, [*refused.values()], tuple(refused))
    if refused:
        reasons = "; ".join(refused.values())
        why = f"no checkpoint verifies; restore one, or train into another folder ({reasons})"
        raise CheckpointError(folder, why)
    return ResumePoint(None, {}, [])


def find_to_use(folder: Path, which: str = "", alone: bool = False) -> ResumePoint:
    """Look for the checkpoint that a finished run is used by; collective.

    Args:
        which: `newest`, `best`, or the number of a step; empty = the best where training looked for it.
        alone: as in `find`.

    Raises:
        CheckpointError: there is none.
    """
    newest = find(folder, alone)
    if newest.path is None:
        raise CheckpointError(folder, "no usable checkpoint; train the run to the end first")
    candidates = _answer(alone, partial(files.choose, folder, newest.path, newest.state, which))
    if newest.path in candidates:
        return newest
    reasons = list[str]()
    for chosen in candidates:
        try:
            _verify_chain(chosen, alone)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        state = _answer(alone, partial(read_state, chosen))
        return replace(newest, path=chosen, state=state, refused=[*newest.refused, *reasons])
    if which:
        raise CheckpointError(candidates[0], f"cannot be used: {'; '.join(reasons)}")
    return replace(newest, refused=[*newest.refused, *(f"the best one: {reason}" for reason in reasons)])


def _answer(alone: bool, compute: Callable[[], Result]) -> Result:
    """What this rank computes by itself, or what rank 0 computes for all."""
    return compute() if alone else from_rank_0(compute)


def load_tensors(path: Path, tensors: dict[str, Any], *, distributed: bool = True) -> None:
    """Fill a state dict in place from a verified checkpoint, whatever plan or world size wrote it.

    Raises:
        CheckpointError: the tensors are others, or a file cannot be read; OSError: the store cannot.
    """
    reader = ChainReader(path)
    try:
        from_every_rank(reader.open) if distributed else reader.open()
        dcp.load(tensors, storage_reader=reader, no_dist=not distributed)
    except (RuntimeError, ValueError, OSError, BadZipFile, dcp.api.CheckpointException) as error:
        if isinstance(cause := _cause(error), OSError):
            raise_of_store(path, cause)
            raise CheckpointError(path, f"cannot be read: {_reason(cause)}") from None
        raise CheckpointError(path, f"does not fit this configuration: {_reason(error)}") from None


def _write(
    part: Path, tensors: Mapping[str, Any], group: Group, delta: Delta | None, besides: Sequence[Beside]
) -> Entries:
    """This rank's files, synced; -> their manifest entries."""
    writer = HashedWriter(part)
    shards, rank = () if delta is None else delta.shards, dist.get_rank(group)
    try:
        dcp.save(dict(tensors), storage_writer=writer, planner=BlockPlanner(), process_group=group)
        entries = writer.files.entries | write_rows(part, delta_name(rank), shards)
        for beside in besides:
            entries |= beside(part, rank)
        return entries
    except (Exception, dcp.api.CheckpointException) as error:
        if rank not in getattr(error, "failures", {rank: None}):
            # DCP raises on all ranks; those whose fault it is can say why.
            return {}
        wanted = sum(shard.tensor.nbytes for whole in tensors_of(tensors) for shard in local_shards(whole))
        wanted += sum(shard.count * shard.row_bytes for shard in shards)
        sizes = f"{wanted / 1e6:,.1f} MB"
        if (free := free_disk(part.parent)) is not None:
            sizes += f" with {free / 1e6:,.1f} MB free"
        reason = _reason(writer.files.problem or error)
        raise CheckpointError(part, f"writing {sizes}: {reason}") from None


def _finish(
    part: Path, final: Path, written: list[Entries], state: Mapping[str, Any], damage: str = ""
) -> None:
    entries = files.write_state(part, state)
    for mine in written:
        entries |= mine
    files.seal(part, entries)
    files.publish(part, final, damage)


def _verify_chain(path: Path, alone: bool, seen: dict[Path, CheckpointError | None] | None = None) -> None:
    """Check a checkpoint and all that it builds on, all ranks together where this one is not alone.

    Args:
        seen: those whose own files were looked at before, and what is wrong there; more are added.

    Raises:
        CheckpointError: one of them is damaged, or is not the one that was built on; on all ranks.
    """
    seen = {} if seen is None else seen
    here: Path | None = path
    while here is not None:
        try:
            if here not in seen:
                seen[here] = _problem(here, alone)
            if (problem := seen[here]) is not None:
                raise problem
            base = _answer(alone, partial(_next_link, here))
        except CheckpointError as error:
            if here == path:
                raise
            raise CheckpointError(path, f"builds on {here.name}, which is of no use: {error}") from None
        here = base


def _problem(path: Path, alone: bool) -> CheckpointError | None:
    """What is wrong with the files of a checkpoint; on all ranks."""
    try:
        _verify(path, alone)
    except CheckpointError as error:
        return error
    return None


def _next_link(path: Path) -> Path | None:
    """The checkpoint that a verified one builds on.

    Raises:
        CheckpointError: it is not there, or was replaced.
    """
    base = base_of(path, read_state(path))
    if base is None:
        return None
    folder = path.parent / base.link.name
    try:
        same = files.manifest_digest(folder) == base.link.sha256
    except OSError as error:
        raise_of_store(folder, error)
        raise CheckpointError(path, f"builds on {folder.name}: {error.strerror}") from None
    if not same:
        raise CheckpointError(path, f"builds on another {folder.name} than is there now")
    return folder


def _verify(path: Path, alone: bool) -> None:
    """Check a checkpoint, all ranks together where this one is not alone.

    Raises:
        CheckpointError: it is damaged; on all ranks.
    """
    if alone:
        verify(path)
        return
    entries = from_rank_0(partial(files.read_manifest, path))
    # The largest files first, each to the rank that has least so far.
    loads, mine = [0] * dist.get_world_size(), {}
    for name in sorted(entries, key=lambda name: (-entries[name]["bytes"], name)):
        least = loads.index(min(loads))
        loads[least] += entries[name]["bytes"]
        if least == dist.get_rank():
            mine[name] = entries[name]
    from_every_rank(lambda: files.check_files(path, mine), slow=True)


def _cause(error: BaseException) -> BaseException:
    """What went wrong on a rank, out of DCP's error of all ranks."""
    failures = getattr(error, "failures", None)
    cause: BaseException = next(iter(failures.values()))[0] if failures else error
    return cause


def _reason(error: BaseException) -> str:
    """The first line that says something."""
    cause = _cause(error)
    if isinstance(cause, OSError) and "://" in str(cause.filename):
        return f"{cause.filename}: {cause.strerror}"
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
