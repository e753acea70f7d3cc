"""How much of a server clients may take together: bytes of bodies and answers, connections, and time.

Nothing here knows a transport: every adapter counts by it.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.ranks.machine import return_freed_memory
from trainer.serving.request import RequestError

# Beyond it, the C library is told to give memory back.
_MUCH = 16 << 20


@dataclass(frozen=True)
class LoadLimits:
    """What all clients together may take.

    Attributes:
        connections: open at once; more are turned away with 503.
        in_flight: bytes of all bodies and answers that are held; beyond, bodies are turned away with 503.
        seconds: that a client has for a request's head, then for its body, and then to read the answer.
    """

    connections: int = 512
    in_flight: int = 256 << 20
    seconds: float = 30.0


class InFlight:
    """Counts the bytes that are held for clients."""

    def __init__(self, most: int) -> None:
        self.most, self.held, self._peak = most, 0, 0

    def change(self, size: int) -> None:
        """Add to what is held. After a large amount is let go, the C library gives memory back."""
        self.held += size
        self._peak = max(self._peak, self.held)
        if not self.held and self._peak > _MUCH:
            self._peak = 0
            return_freed_memory()


class Hold:
    """The bytes that one request holds, from the first of its body to the last of its answer."""

    def __init__(self, all_: InFlight) -> None:
        self._all, self.bytes = all_, 0

    def resize(self, size: int) -> None:
        """Hold so many bytes from now on; RequestError (503) where that is too much for all clients."""
        if self._all.held - self.bytes + size > self._all.most:
            problem = f"the server holds {self._all.most:,} bytes for its clients already (limits.in_flight)"
            raise RequestError(503, f"{problem}; try again")
        self._all.change(size - self.bytes)
        self.bytes = size

    def release(self) -> None:
        self._all.change(-self.bytes)
        self.bytes = 0
