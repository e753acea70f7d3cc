"""States that are shared with other processes, through a store whose failures cost no request anything.

A look-up waits for the store as long as the store's own time-out says; after a failure the store is left
alone for some seconds. Writes happen later, in a thread, from a bounded queue.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from trainer.serving.user_state.codec import DamagedState, ForeignState, decode, encode
from trainer.serving.user_state.state import UserState
from trainer.serving.user_state.store import StateStore

# `found` and `absent`: the store answered; `damaged`, `foreign`: what it answered is no state of this key, so
# it is as good as absent; `failed`: it did not answer; `rested`: it failed a moment ago, and was not asked.
LookUp = Literal["found", "absent", "damaged", "foreign", "failed", "rested"]
# `written`; `dropped`: the queue was full, the store was left alone, the state holds what is no number, or a
# table of its version was overwritten; `failed`.
Write = Literal["written", "dropped", "failed"]
LOOK_UPS: tuple[LookUp, ...] = ("found", "absent", "damaged", "foreign", "failed", "rested")
WRITES: tuple[Write, ...] = ("written", "dropped", "failed")


@dataclass(frozen=True)
class StoreStatistics:
    """How a store did, as seen from this process.

    Attributes:
        look_ups, writes: outcome -> how many so far; waiting: bytes of states that are to be written.
        problem: the last failure in words; empty if there was none.
    """

    look_ups: dict[str, int] = field(default_factory=dict)
    writes: dict[str, int] = field(default_factory=dict)
    waiting: int = 0
    problem: str = ""


class SecondLevel:
    """A store of user states behind a cache in memory; may be used from several threads and never raises.

    Args:
        store: is closed with it; rest: seconds for which it is left alone after a failure.
        most_waiting: bytes of states that may wait to be written. Of one user only the newest state waits.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        store: StateStore,
        rest: float = 5.0,
        most_waiting: int = 64 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._rest, self._most, self._clock = store, rest, most_waiting, clock
        self._asleep_until = float("-inf")
        self._look_ups: Counter[str] = Counter(dict.fromkeys(LOOK_UPS, 0))
        self._writes: Counter[str] = Counter(dict.fromkeys(WRITES, 0))
        self._problem = ""
        self._queue: OrderedDict[bytes, tuple[UserState, Callable[[], bool]]] = OrderedDict()
        self._waiting = 0
        self._closed = self._busy = False
        # Nobody closes the store while it is asked.
        self._asking = threading.Lock()
        self._changed = threading.Condition()
        self._writer = threading.Thread(target=self._write_all, name="user states", daemon=True)
        self._writer.start()

    def get(self, key: bytes) -> UserState | None:
        """The state of a key that some process put there; None where there is none that can be believed."""
        outcome, state = self._look_up(key)
        with self._changed:
            self._look_ups[outcome] += 1
        return state

    def _look_up(self, key: bytes) -> tuple[LookUp, UserState | None]:
        try:
            with self._asking:
                if self._closed or not self._awake():
                    return "rested", None
                content = self._store.get(key)
            return ("absent", None) if content is None else ("found", decode(key, content))
        except DamagedState:
            return "damaged", None
        except ForeignState:
            return "foreign", None
        # Whatever a store's library raises, a request is worth more.
        except Exception as error:
            self._failed(error)
            return "failed", None

    def put(self, state: UserState, may: Callable[[], bool] = lambda: True) -> None:
        """Have a state written soon; it is dropped where too much waits already.

        Args:
            may: asked in the thread that writes; a state that may not be written by then is dropped.
        """
        with self._changed:
            old = self._queue.pop(state.key, None)
            self._waiting -= 0 if old is None else old[0].nbytes
            if self._closed or not self._awake() or self._waiting + state.nbytes > self._most:
                self._writes["dropped"] += 1
                return
            self._queue[state.key] = state, may
            self._waiting += state.nbytes
            self._changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Wait until nothing waits to be written -> whether that came about in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._busy, seconds)

    def statistics(self) -> StoreStatistics:
        with self._changed:
            return StoreStatistics(dict(self._look_ups), dict(self._writes), self._waiting, self._problem)

    def close(self, seconds: float = 2.0) -> None:
        """Write what waits, for some seconds at most, and close the store once nobody uses it."""
        self.flush(seconds)
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._waiting = 0
            self._changed.notify_all()
        self._writer.join(seconds)

    def _awake(self) -> bool:
        return self._clock() >= self._asleep_until

    def _failed(self, error: Exception) -> None:
        self._asleep_until = self._clock() + self._rest
        self._problem = " ".join(str(error).split())[:200]

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    break
                _, (state, may) = self._queue.popitem(last=False)
                self._waiting -= state.nbytes
                self._busy = True
            outcome = self._write(state, may)
            with self._changed:
                self._writes[outcome] += 1
            # Else its memory stays until the next one is written.
            del state, may
        with self._asking:
            self._store.close()

    def _write(self, state: UserState, may: Callable[[], bool]) -> Write:
        try:
            if not self._awake() or not state.is_finite() or not may():
                return "dropped"
            self._store.put(state.key, encode(state))
        except Exception as error:
            self._failed(error)
            return "failed"
        return "written"
