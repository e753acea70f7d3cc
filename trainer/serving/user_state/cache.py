"""The states of the users that were scored last, in memory."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Literal

from trainer.serving.user_state.second_level import SecondLevel, StoreStatistics
from trainer.serving.user_state.state import UserState

# `hit`: the state had all behaviors; `extended`: newer ones were added to it; `miss`: there was none;
# `stale`: there was one of another history.
Outcome = Literal["hit", "extended", "miss", "stale"]
OUTCOMES: tuple[Outcome, ...] = ("hit", "extended", "miss", "stale")


@dataclass(frozen=True)
class Statistics:
    """How a cache did.

    Attributes:
        outcomes: outcome -> requests so far; entries, bytes: that it holds now.
        evicted: states that gave way to others; too_large: states that were larger than the cache.
        store: how the second level did; None without one.
    """

    outcomes: dict[str, int] = field(default_factory=dict)
    entries: int = 0
    bytes: int = 0
    evicted: int = 0
    too_large: int = 0
    store: StoreStatistics | None = None

    @property
    def bytes_per_user(self) -> float:
        """NaN without any."""
        return self.bytes / self.entries if self.entries else float("nan")


class StateCache:
    """One state a user, of so many bytes together; the one that was used longest ago gives way.

    May be used from several threads.

    Args:
        most: bytes.
        second: where states lie that are not here; it is closed when the cache goes.
    """

    def __init__(self, most: int, second: SecondLevel | None = None) -> None:
        self._second = second
        if second is not None:
            weakref.finalize(self, second.close, 0.0)
        self._most, self._held = most, 0
        self._states: OrderedDict[bytes, UserState] = OrderedDict()
        self._outcomes: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        self._evicted = self._too_large = 0
        self._lock = threading.Lock()

    def get(self, key: bytes) -> UserState | None:
        """The state of a key, from here or from the second level; it is then the last that was used."""
        with self._lock:
            state = self._states.get(key)
            if state is not None:
                self._states.move_to_end(key)
        if state is None and self._second is not None:
            state = self._second.get(key)
            if state is not None:
                self._keep(state)
        return state

    def put(self, state: UserState) -> None:
        """Keep a state in the place of the one with its key. One that is larger than all is not kept."""
        self._keep(state)
        if self._second is not None:
            self._second.put(state)

    def _keep(self, state: UserState) -> None:
        with self._lock:
            old = self._states.pop(state.key, None)
            self._held -= 0 if old is None else old.nbytes
            if state.nbytes > self._most:
                self._too_large += 1
                return
            self._states[state.key] = state
            self._held += state.nbytes
            while self._held > self._most:
                self._held -= self._states.popitem(last=False)[1].nbytes
                self._evicted += 1

    def count(self, outcome: Outcome) -> None:
        with self._lock:
            self._outcomes[outcome] += 1

    def statistics(self) -> Statistics:
        store = None if self._second is None else self._second.statistics()
        with self._lock:
            held = len(self._states), self._held
            return Statistics(dict(self._outcomes), *held, self._evicted, self._too_large, store)
