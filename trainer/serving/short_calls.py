"""Which model calls the event loop makes itself: to change threads takes as long as a short call does."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from trainer.serving.model_calls import Outcome, Portion, score_portions
from trainer.serving.pace import Pace
from trainer.serving.scorer import Seconds

# For so long, calls go to their own thread after one that waited for a disk: others may wait as well.
_PAUSE_SECONDS = 1.0


class Measured(NamedTuple):
    """What `score_portions` found, and what it took.

    Attributes:
        processor: seconds of the processor; reads: how often it waited for a page of a mapped table.
    """

    outcomes: list[Outcome]
    seconds: Seconds
    processor: float
    reads: int


def score_measured(portions: Sequence[Portion]) -> Measured:
    """See `score_portions`. What it takes is that of the thread which calls."""
    reads, began = _reads_of_disk(), time.thread_time()
    outcomes, seconds = score_portions(portions)
    return Measured(outcomes, seconds, time.thread_time() - began, _reads_of_disk() - reads)


class ShortCalls:
    """Tells which model calls are short, by what others took of the processor and by what they waited for.

    Args:
        threads: of the model. Where the event loop's thread has another number, it makes no calls.
    """

    def __init__(self, threads: int) -> None:
        self._threads, self._pace = threads, Pace()
        self._not_before = -math.inf

    def note(self, work: int, call: Measured, now: float) -> None:
        """Count a model call that has ended `now`, in whichever thread; for `work` see `Pace`."""
        self._pace.note(work, call.processor, now)
        if call.reads:
            self._not_before = now + _PAUSE_SECONDS

    def allow(self, portions: Sequence[Portion], work: int, most: float, now: float) -> bool:
        """Whether the event loop may make a call; `most`: seconds that the call may take."""
        if not 0 < self._pace.seconds(work, now, busy=True) <= most or now < self._not_before:
            return False
        # What is told of candidates besides their scores is no part of the work that is known before.
        if any(portion.explain or portion.exploration is not None for portion in portions):
            return False
        states = portions[0].scorer.states
        # What other processes share is asked over a network.
        waits = states is not None and states.store is not None
        return not waits and torch.get_num_threads() == self._threads


def _reads_of_disk() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
