"""Saves while training goes on: the tensors are copied, a thread writes the copy.

One save at a time: the next one waits for it. What goes wrong in the thread is raised by a later call on
every rank alike, because a save's own collectives tell all ranks of it. Where training waits for a save, a
thread writes it all the same, from where the tensors lie: the ranks that wait can then miss a lost one.
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from embeddings.agreement import from_every_rank, from_rank_0
from embeddings.errors import CheckpointError
from embeddings.lookup.mapped import read_in_order
from embeddings.lookup.touched import TouchedRows
from embeddings.plan.memory import gigabytes
from trainer.checkpoint import files
from trainer.checkpoint import save_load as checkpoint
from trainer.checkpoint.delta import Delta, Link, TouchedShard, names_of_rows, touched_shards, without_rows
from trainer.checkpoint.staging import StagedCopy, device_of
from trainer.config.sections import CheckpointConfig
from trainer.ranks.machine import free_memory_bytes
from trainer.ranks.process_group import sum_counts, tells_of_a_lost_rank

# How long a save under way may still take when training has failed; and when that was because of a lost rank,
# which the save most likely needs, too.
_GRACE_S, _LOST_S = 60.0, 2.0
_WORTH_SAYING_S, _LOOK_S = 1.0, 0.5
# What must be free for a copy, over its size: training itself takes more now and then.
_MARGIN = 1.1
# The most of the tables that a delta may hold; beyond, a full save is no larger for what it spares later.
_MOST = 0.5
_ID_BYTES = 8


class Saver:
    """Writes the checkpoints of a run; use as a context manager.

    Its copy of this rank's shards stays in host memory from the first asynchronous save on: making it anew
    would cost each save as long as filling it.

    Args:
        folder: the run's `checkpoints` folder; say: prints a line on rank 0.
        local_ranks: that share this machine's memory.
        touched: marks the rows that change; needed where `full_every` is above 1.

    Attributes:
        saved: step of the newest checkpoint known to be in place, resumed from or written; -1 = none.
        refused: names of those that the start found to be of no use.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        say: Callable[[str], None],
        local_ranks: int = 1,
        touched: TouchedRows | None = None,
    ) -> None:
        self.folder, self.config, self.say = folder, config, say
        timeout = datetime.timedelta(minutes=config.timeout_minutes)
        # Of its own, so that its collectives cannot mix with those of the steps.
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self.saved, self.refused = -1, set[str]()
        self._copy, self._roomy, self._local_ranks = StagedCopy(), False, local_ranks
        # Of `auto`, what the newest full save was, `async` or `sync`; empty: there was none.
        self._mode = ""
        self._running: _Save | None = None
        self._touched = touched
        # What a delta would build on, and how many deltas there are since the last full one.
        self._base: Path | None = None
        self._links, self._follow_next = 0, False

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running is not None and error is not None:
            self._running.join(_LOST_S if tells_of_a_lost_rank(error) else _GRACE_S)
        if error is None:
            self._copy.close()

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed and was not yet spoken of."""
        return self._running is not None and self._running.problem is not None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Any],
        state: Mapping[str, Any],
        best: int = -1,
        last: bool = False,
        besides: Sequence[checkpoint.Beside] = (),
    ) -> None:
        """Save what training stands at; collective. Returns once the tensors may change again.

        Args:
            best: the step whose checkpoint stays, however old it gets; -1 = none.
            last: as in `settle`, of this save.
            besides: see `save_load.save`; what they write must not change any more.

        Raises:
            CheckpointError: this save failed, or the one before, and `on_error` is `stop`.
        """
        self.settle()
        device, delta = device_of(tensors), self._delta(step, tensors)
        whole = tensors if delta is None else without_rows(tensors, delta.names)
        copied = StagedCopy.bytes_of(whole)
        copied += 0 if delta is None else sum(shard.count * shard.row_bytes for shard in delta.shards)
        if in_background := self._in_background(copied, delta is not None):
            with read_in_order():
                whole, in_background = self._staged(whole, delta)
        keep, refused = self.config.keep, frozenset(self.refused)
        of_this = self.folder, step, whole, state, keep, best, self._group, delta, refused, besides
        write = partial(checkpoint.save, *of_this)
        self._running = save = _Save(self.folder, step, write, device, 0 if delta is None else delta.links)
        # Whoever trains beside a save asks for mapped rows in no order; the save has its copy of them.
        with nullcontext() if in_background else read_in_order():
            save.start()
            if not in_background:
                self.settle(last)

    def settle(self, last: bool = False) -> None:
        """Wait for the save under way and report it.

        Args:
            last: nothing would be tried again, so a failure raises whatever `on_error` says.

        Raises:
            CheckpointError: it failed; on every rank.
        """
        save = self._running
        if save is None:
            return
        started = time.monotonic()
        # All ranks wait together, so that one that is gone is missed as in a step: what the save itself
        # exchanges may take an hour (`timeout_minutes`). A slow save is no lost rank, since its rank answers.
        while sum_counts([int(save.is_alive())])[0]:
            save.join(_LOOK_S)
        self._running, waited = None, time.monotonic() - started
        if self._touched is not None:
            # The next one may be of another kind, and both would lie beside the tables.
            self._copy.close()
            self._roomy = False
        if save.problem is None:
            self.saved = save.step
            self.refused.discard(save.path.name)
            if self._follow_next:
                self._base, self._links = save.path, save.links
            slow = f" (waited {waited:.0f} s for it)" if waited > _WORTH_SAYING_S and not last else ""
            kind = ", incremental" if save.links else ""
            self.say(f"checkpoint {save.path}{kind}{slow}")
        elif last or self.config.on_error == "stop":
            raise save.problem
        else:
            self.say(f"not saved, training goes on: {save.problem}")

    def follow(self, path: Path | None, links: int = 0) -> None:
        """The weights are now those of a checkpoint, which deltas may build on, or (None) of none.

        Args:
            links: deltas since the last full one.
        """
        self._base, self._links = path, links
        # A save under way is of weights that are no longer there.
        self._follow_next = False
        if self._touched is not None:
            self._touched.take()

    def _delta(self, step: int, tensors: Mapping[str, Any]) -> Delta | None:
        """What is to be written instead of whole tables; None: they are; collective."""
        if self._touched is None:
            return None
        bits = self._touched.take()
        shards = touched_shards(tensors, bits)
        mine = (
            sum(shard.count * (shard.row_bytes + _ID_BYTES) for shard in shards),
            sum(self._touched.rows[key] * shard.row_bytes for key, shard in zip(bits, shards, strict=True)),
            # A rank without rows of a table knows nothing of their optimizer's state.
            names_of_rows(tensors, {key.table for key in bits}),
        )
        every = from_every_rank(lambda: mine)
        touched, whole = sum(each[0] for each in every), sum(each[1] for each in every)
        names = [*dict.fromkeys(chain.from_iterable(each[2] for each in every))]
        link, new = from_rank_0(lambda: self._link(step))
        # Of a step that is there already it is not known whether its bits are ours.
        base, self._base = self._base, None
        self._follow_next = new
        if base is None or link is None or touched > _MOST * whole:
            return None
        return Delta(link, self._links + 1, shards, names)

    def _link(self, step: int) -> tuple[Link | None, bool]:
        """What a delta would build on, and whether there is no checkpoint of this step yet."""
        try:
            new = not files.of_step(self.folder, step)
        except OSError:
            # A store that cannot be asked: this save is full and fails by itself, or finds the store again.
            return None, False
        if self._base is None or not new or self._links + 1 >= self.config.full_every:
            return None, new
        try:
            return Link(self._base.name, files.manifest_digest(self._base)), new
        except OSError:
            # Somebody has deleted it.
            return None, new

    def _in_background(self, copied: int, of_delta: bool) -> bool:
        """Whether a save is to be written by the thread; collective.

        `auto` asks whether the copy fits into every rank's memory: at the first save, whose copy stays, and
        where there are deltas at each save, since nothing stays of a copy then.

        Args:
            copied: bytes that this rank would copy.
        """
        if self.config.mode != "auto":
            return self.config.mode == "async"
        if self._mode and self._touched is None:
            return self._mode == "async"
        free = free_memory_bytes() // self._local_ranks
        places = from_every_rank(lambda: (copied * _MARGIN <= free, copied, free))
        # The rank that is worst off speaks for all.
        fits, copied, free = min(places, key=lambda place: (place[0], place[2] - place[1]))
        found = "async" if fits else "sync"
        if not of_delta and found != self._mode:
            rank, self._mode = places.index((fits, copied, free)), found
            sizes = f"a copy of {gigabytes(copied)} for a save in the background"
            sizes += f", and {gigabytes(free)} are free"
            what = "training goes on during a save" if fits else "training waits for each save"
            self.say(f'checkpoint.mode = "auto": {self._mode}, {what}; rank {rank} needs {sizes}')
        return fits

    def _staged(self, tensors: Mapping[str, Any], delta: Delta | None) -> tuple[Mapping[str, Any], bool]:
        """A copy of the tensors and of a delta's rows; themselves where `auto` finds no memory after all."""

        def make_room() -> None:
            self._make_room(tensors, () if delta is None else delta.shards)

        # A phase may have more to save than the one before it, on all ranks alike.
        if not (self._roomy and self._copy.fits(tensors)):
            try:
                # All ranks hear of one that has no memory, for which they would else wait in the save. To
                # lock much of it takes longer than a collective waits.
                from_every_rank(make_room, slow=True)
            except CheckpointError as error:
                if self.config.mode != "auto":
                    raise
                self._copy.close()
                self._mode = "sync"
                self.say(f'checkpoint.mode = "auto": sync, training waits for each save; {error.problem}')
                return tensors, False
            self._roomy = True
        copied: Mapping[str, Any] = self._copy.take(tensors)
        return copied, True

    def _make_room(self, tree: Mapping[str, Any], shards: Sequence[TouchedShard] = ()) -> None:
        try:
            self._copy.make_room(tree)
            for shard in shards:
                shard.hold()
        except (MemoryError, RuntimeError) as error:
            why = f"no host memory for a copy of this rank's shards ({' '.join(str(error).split())})"
            raise CheckpointError(self.folder, f'{why}; checkpoint.mode = "sync" needs none') from None


class _Save(threading.Thread):
    """One save. A daemon, because a peer that died must not keep this process from ending."""

    def __init__(
        self, folder: Path, step: int, write: Callable[[], Path], device: torch.device | None, links: int
    ) -> None:
        super().__init__(name=f"save of step {step}", daemon=True)
        self.folder, self.step, self.path, self.links = folder, step, Path(), links
        self._write, self._device = write, device
        self.problem: CheckpointError | None = None

    def run(self) -> None:
        try:
            if self._device is not None:
                # A thread begins with device 0, on which each rank would open a context of its own.
                torch.cuda.set_device(self._device)
            self.path = self._write()
        except CheckpointError as error:
            self.problem = error
        except BaseException as error:
            # Raised in the training thread instead: here nobody would see it. DCP's own are no Exceptions.
            reason = str(error).strip() or type(error).__name__
            self.problem = CheckpointError(self.folder, f"the save broke off: {reason}")
