"""Saves while training goes on: the tensors are copied, a thread writes the copy.

One save at a time: the next one waits for it. What goes wrong in the thread is raised by a later call on
every rank alike, because a save's own collectives tell all ranks of it.
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from embeddings.agreement import from_every_rank
from embeddings.errors import CheckpointError
from trainer.checkpoint import save_load as checkpoint
from trainer.checkpoint.staging import StagedCopy, device_of
from trainer.config.sections import CheckpointConfig
from trainer.ranks.machine import free_memory_bytes
from trainer.ranks.process_group import tells_of_a_lost_rank

# How long a save under way may still take when training has failed; and when that was because of a lost rank,
# which the save most likely needs, too.
_GRACE_S, _LOST_S = 60.0, 2.0
_WORTH_SAYING_S = 1.0
# What must be free for a copy, over its size: training itself takes more now and then.
_MARGIN = 1.1


class Saver:
    """Writes the checkpoints of a run; use as a context manager.

    Its copy of this rank's shards stays in host memory from the first asynchronous save on: making it anew
    would cost each save as long as filling it.

    Args:
        folder: the run's `checkpoints` folder; say: prints a line on rank 0.
        local_ranks: that share this machine's memory.

    Attributes:
        saved: step of the newest checkpoint known to be in place, resumed from or written; -1 = none.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, say: Callable[[str], None], local_ranks: int = 1
    ) -> None:
        self.folder, self.config, self.say = folder, config, say
        timeout = datetime.timedelta(minutes=config.timeout_minutes)
        # Of its own, so that its collectives cannot mix with those of the steps.
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self.saved = -1
        self._copy, self._roomy, self._local_ranks = StagedCopy(), False, local_ranks
        # `async` or `sync`; empty: the first save is to find out.
        self._mode = "" if config.mode == "auto" else config.mode
        self._running: _Save | None = None

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

    def save(self, step: int, tensors: Mapping[str, Any], state: Mapping[str, Any], best: int = -1) -> None:
        """Save what training stands at; collective. Returns once the tensors may change again.

        Args:
            best: the step whose checkpoint stays, however old it gets; -1 = none.

        Raises:
            CheckpointError: this save failed, or the one before, and `on_error` is `stop`.
        """
        self.settle()
        device = device_of(tensors)
        if not self._mode:
            self._choose(tensors)
        if self._mode == "async":
            tensors = self._staged(tensors)
        write = partial(
            checkpoint.save, self.folder, step, tensors, state, self.config.keep, best, self._group
        )
        self._running = save = _Save(self.folder, step, write, device)
        if self._mode == "async":
            save.start()
        else:
            save.run()
            self.settle()

    def settle(self, last: bool = False) -> None:
        """Wait for the save under way and report it.

        Args:
            last: nothing would be tried again, so a failure raises whatever `on_error` says.

        Raises:
            CheckpointError: it failed; on every rank.
        """
        save, self._running = self._running, None
        if save is None:
            return
        started = time.monotonic()
        if save.is_alive():
            save.join()
        waited = time.monotonic() - started
        if save.problem is None:
            self.saved = save.step
            slow = f" (waited {waited:.0f} s for it)" if waited > _WORTH_SAYING_S and not last else ""
            self.say(f"checkpoint {save.path}{slow}")
        elif last or self.config.on_error == "stop":
            raise save.problem
        else:
            self.say(f"not saved, training goes on: {save.problem}")

    def _choose(self, tensors: Mapping[str, Any]) -> None:
        """Take `async` where every rank has free memory for the copy, else `sync`; collective."""
        copy, free = StagedCopy.bytes_of(tensors), free_memory_bytes() // self._local_ranks
        places = from_every_rank(lambda: (copy * _MARGIN <= free, copy, free), self._group)
        # The rank that is worst off speaks for all.
        fits, copy, free = min(places, key=lambda place: (place[0], place[2] - place[1]))
        rank, self._mode = places.index((fits, copy, free)), "async" if fits else "sync"
        sizes = f"a copy of {_size(copy)} for a save in the background, and {_size(free)} are free"
        what = "training goes on during a save" if fits else "training waits for each save"
        self.say(f'checkpoint.mode = "auto": {self._mode}, {what}; rank {rank} needs {sizes}')

    def _staged(self, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        """A copy of the tensors; themselves where `auto` finds no memory for one after all."""
        if not self._roomy:
            try:
                # All ranks hear of one that has no memory, for which they would else wait in the save.
                from_every_rank(lambda: self._make_room(tensors), self._group)
            except CheckpointError as error:
                if self.config.mode != "auto":
                    raise
                self._copy.close()
                self._mode = "sync"
                self.say(f'checkpoint.mode = "auto": sync, training waits for each save; {error.problem}')
                return tensors
            self._roomy = True
        elif not self._copy.fits(tensors):
            self._make_room(tensors)
        copied: Mapping[str, Any] = self._copy.take(tensors)
        return copied

    def _make_room(self, tree: Mapping[str, Any]) -> None:
        try:
            self._copy.make_room(tree)
        except (MemoryError, RuntimeError) as error:
            why = f"no host memory for a copy of this rank's shards ({' '.join(str(error).split())})"
            raise CheckpointError(self.folder, f'{why}; checkpoint.mode = "sync" needs none') from None


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


class _Save(threading.Thread):
    """One save. A daemon, because a peer that died must not keep this process from ending."""

    def __init__(
        self, folder: Path, step: int, write: Callable[[], Path], device: torch.device | None
    ) -> None:
        super().__init__(name=f"save of step {step}", daemon=True)
        self.folder, self.step, self.path = folder, step, Path()
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
        except Exception as error:
            # Raised in the training thread instead: here nobody would see it.
            self.problem = CheckpointError(self.folder, f"the save broke off: {error}")
