"""Connections of `tandemrec serve`: how many there are, and how long a client may let one wait.

uvicorn leaves a connection open for ever whose client sends half a head, or does not read its answer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipelines.serve.load import LoadLimits

_LONGEST_HEAD = 64 << 10
_FEW_PARTS, _SHORT_PART = 1_000, 256


class BoundedConnection(h11.Connection):
    """Refuses bodies in crumbs: each event costs some 30 microseconds, however few bytes it brings."""

    def __init__(self, most: int) -> None:
        super().__init__(h11.SERVER, most)
        self._parts = self._bytes = 0

    def next_event(self) -> Any:
        """Raises h11.RemoteProtocolError too for a body in chunks of a few bytes."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._parts = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._parts, self._bytes = self._parts + 1, self._bytes + len(event.data)
            if self._parts > _FEW_PARTS + self._bytes / _SHORT_PART:
                raise h11.RemoteProtocolError("a body in chunks of a few bytes")
        return event


class BoundedProtocol(H11Protocol):
    """One connection. A subclass by `protocol` knows the limits."""

    limits = LoadLimits()
    refused: Callable[[int], None]
    _turned_away = False
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.conn = BoundedConnection(_LONGEST_HEAD)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first head must come in time."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._turned_away = True
            most = f"{self.limits.connections} connections are open (--max-connections)"
            self._refuse(503, f"{most}; try again")
        else:
            self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer = _cancelled(self._head_timer)
        self._write_timer = _cancelled(self._write_timer)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Between two requests the clock of a head runs, until the head has come whole."""
        if self._turned_away:
            return
        super().data_received(data)
        self._watch_head()

    def _watch_head(self) -> None:
        answered = self.cycle is None or self.cycle.response_complete
        if not (answered and self.conn.their_state is h11.IDLE):
            self._head_timer = _cancelled(self._head_timer)
        elif self._head_timer is None:
            problem = f"no request came within {self.limits.seconds:g} s"
            self._head_timer = self.loop.call_later(self.limits.seconds, self._refuse, 408, problem)

    def pause_writing(self) -> None:
        """The client does not read as fast as it is answered."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.cycle is None or self.cycle.response_complete:
            self._write_timer = _cancelled(self._write_timer)

    def on_response_complete(self) -> None:
        """A client that has taken the whole answer has no more time to keep."""
        if not self.flow.write_paused:
            self._write_timer = _cancelled(self._write_timer)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, as one line of JSON as other errors are."""
        self._refuse(400, "this is no valid HTTP request")

    def _refuse(self, status: int, problem: str) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
            return
        self.refused(status)
        body = json.dumps({"error": problem}).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()


def protocol(limits: LoadLimits, refused: Callable[[int], None]) -> type[asyncio.Protocol]:
    """The class that uvicorn makes connections of.

    Args:
        refused: told the status of every answer that a connection gives itself.
    """
    members: dict[str, Any] = {"limits": limits, "refused": staticmethod(refused)}
    return cast("type[asyncio.Protocol]", type("Bounded", (BoundedProtocol,), members))


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """None, in place of a timer that must not go off."""
    if timer is not None:
        timer.cancel()
    return None
