"""What happens beside the steps, agreed by all ranks: a stop signal, the clock, a save that failed."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist

from trainer.config.sections import CheckpointConfig


@dataclass(frozen=True)
class Interrupt:
    """What happened, the same on all ranks.

    Attributes:
        stop: some rank was asked to stop; save_due: the minutes between two saves are over; save_failed: some
            rank's save in the background failed.
    """

    stop: bool = False
    save_due: bool = False
    save_failed: bool = False


class Interrupts:
    """Looks between steps, at the same ones on every rank, for what has happened beside them.

    A signal may reach ranks at different steps, and clocks differ, so each look is one all-reduce of three
    numbers; `check_every` makes it rare.
    """

    def __init__(self, config: CheckpointConfig) -> None:
        self._every = 1 if dist.get_world_size() == 1 else config.check_every
        self._seconds = config.every_minutes * 60
        self._stop = False
        self.restart_clock()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM as a wish to stop at the next look; further ones change nothing."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._stop = True

        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def restart_clock(self) -> None:
        """A save was just made."""
        self._saved = time.monotonic()

    def look(self, step: int, failed: bool) -> Interrupt:
        """After `step` steps; collective at every `check_every`th of them.

        Args:
            failed: this rank's save in the background has failed.
        """
        if step % self._every:
            return Interrupt()
        late = time.monotonic() - self._saved >= self._seconds
        due = bool(self._seconds) and dist.get_rank() == 0 and late
        flags = torch.tensor([self._stop, due, failed], dtype=torch.int64)
        if dist.get_world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return Interrupt(*(bool(flag) for flag in flags))
