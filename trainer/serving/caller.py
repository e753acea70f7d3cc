"""Where the model is called: in a thread of its own, or at once where the call is short."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from trainer.serving.model_calls import Outcome, Portion, score_portions
from trainer.serving.pace import Pace
from trainer.serving.scorer import Scorer, Seconds


@dataclass(frozen=True)
class Begun:
    """A model call.

    Attributes:
        portions: what it scores; work: how much that is, see `trainer.serving.cost`.
        scoring: what becomes of it; None: it is scored as soon as somebody waits for it.
    """

    portions: Sequence[Portion]
    work: int
    began: float
    scoring: asyncio.Future[tuple[list[Outcome], Seconds]] | None


@dataclass(frozen=True)
class Ended:
    """A model call that has ended: of each portion its answers or its error.

    Attributes:
        began: when the model began with it; seconds: what it took.
    """

    outcomes: list[Outcome]
    began: float
    seconds: Seconds


class Caller:
    """Makes model calls, one at a time, and measures how fast the model is.

    To give a short call to a thread, and to be told that it has ended, takes a twentieth of its time. So such
    a call is made by the event loop, which does nothing else meanwhile.

    Args:
        threads: of the model.
    """

    def __init__(self, threads: int) -> None:
        self.pace = Pace()
        # The scorer of the newest call.
        self._newest: Callable[[], Scorer | None] = lambda: None
        self._thread = ThreadPoolExecutor(1, "score", torch.set_num_threads, (threads,))

    def begin(self, portions: Sequence[Portion], work: int, at_once: float, now: float) -> Begun:
        """A call; a thread has begun with it `now`, unless it takes no longer than `at_once`, in seconds."""
        scoring = None
        if not self._is_short(portions[0].scorer, work, at_once, now):
            scoring = asyncio.get_running_loop().run_in_executor(self._thread, score_portions, portions)
        return Begun(portions, work, now, scoring)

    async def ended(self, call: Begun, clock: Callable[[], float]) -> Ended:
        """The call once it has ended; what `begin` calls `now` is by the same clock."""
        began = call.began
        if call.scoring is not None:
            outcomes, seconds = await call.scoring
        else:
            # The answers of the call before go out first.
            await asyncio.sleep(0)
            began = clock()
            outcomes, seconds = score_portions(call.portions)
        now = clock()
        self.pace.note(call.work, now - began, now)
        return Ended(outcomes, began, seconds)

    def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown(wait=True)

    def _is_short(self, scorer: Scorer, work: int, most: float, now: float) -> bool:
        """Whether a call may be made by the event loop.

        None is that is the first of a version, of whose tables nothing may be in memory yet, or that may wait
        for a store of other processes.
        """
        known, self._newest = self._newest() is scorer, weakref.ref(scorer)
        if not known or not 0 < self.pace.seconds(work, now, busy=True) <= most:
            return False
        return scorer.states is None or scorer.states.store is None
