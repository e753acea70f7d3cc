"""The states of the users that were scored last, in memory."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Literal

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
    """

    outcomes: dict[str, int] = field(default_factory=dict)
    entries: int = 0
    bytes: int = 0
    evicted: int = 0
    too_large: int = 0

    @property
    def bytes_per_user(self) -> float:
        """NaN without any."""
        return self.bytes / self.entries if self.entries else float("nan")


class StateCache:
    """One state a user, of so many bytes together; the one that was used longest ago gives way.

    May be used from several threads.

    Args:
        most: bytes.
    """

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._states: OrderedDict[bytes, UserState] = OrderedDict()
        self._outcomes: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        self._evicted = self._too_large = 0
        self._lock = threading.Lock()

    def get(self, key: bytes) -> UserState | None:
        """The state of a key, which is then the last that was used."""
        with self._lock:
            state = self._states.get(key)
            if state is not None:
                self._states.move_to_end(key)
            return state

    def put(self, state: UserState) -> None:
        """Keep a state in the place of the one with its key. One that is larger than all is not kept."""
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
        with self._lock:
            return Statistics(
                dict(self._outcomes), len(self._states), self._held, self._evicted, self._too_large
            )
