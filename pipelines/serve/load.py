"""How much of a server clients may take: connections, bytes of bodies and answers over all of them, and time.

uvicorn leaves a connection open for ever whose client sends half a head, or does not read its answer.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

import h11
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from trainer.serving.request import Limits, RequestError

# An answer is sent in pieces, so that a client that reads slowly is noticed before all of it is handed over.
_PIECE = 256 << 10
# Longer bodies get pages of their own.
_SHORT = 64 << 10
# Beyond it, the C library is told to give memory back.
_MUCH = 16 << 20
_LONGEST_HEAD = 64 << 10
_FEW_PARTS, _SHORT_PART = 1_000, 256


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
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:
                trim(0)


class Hold:
    """The bytes that one request holds, from the first of its body to the last of its answer."""

    def __init__(self, all_: InFlight) -> None:
        self._all, self.bytes = all_, 0

    def resize(self, size: int) -> None:
        """Hold so many bytes from now on; RequestError (503) where that is too much for all clients."""
        if self._all.held - self.bytes + size > self._all.most:
            problem = f"the server holds {self._all.most:,} bytes for its clients already (--max-in-flight)"
            raise RequestError(503, f"{problem}; try again")
        self._all.change(size - self.bytes)
        self.bytes = size

    def release(self) -> None:
        self._all.change(-self.bytes)
        self.bytes = 0


class _Body:
    """A body as it comes: pages of its own where it is long, which go back when it does.

    Not a list of the parts, which may be of one byte each, nor an array that is copied to become longer.
    """

    def __init__(self, most: int) -> None:
        self.size, self._most = 0, most
        self._short = bytearray()
        self._long: mmap.mmap | None = None

    def add(self, part: bytes) -> None:
        self.size += len(part)
        if self._long is None and self.size <= _SHORT:
            self._short += part
            return
        if self._long is None:
            # A page counts once something is written to it.
            self._long = mmap.mmap(-1, self._most, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._long.write(self._short)
        self._long.write(part)

    def view(self) -> memoryview:
        return memoryview(self._short if self._long is None else self._long)[: self.size]


async def read_body(request: Request, limits: Limits, hold: Hold, seconds: float) -> memoryview:
    """The whole body.

    Raises:
        RequestError: 413 as soon as it is seen to be too long, 503 where all clients' bodies are, 415 where
            it is compressed, 408 where it does not come.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise RequestError(415, f"content encoding {encoding[:40]!r} is not read; send the body as it is")
    problem = f"the body is longer than {limits.body:,} bytes (--max-body)"
    announced = request.headers.get("content-length", "0")
    if announced.isascii() and announced.isdigit() and int(announced[:19]) > limits.body:
        raise RequestError(413, problem)
    body = _Body(limits.body)
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                if body.size + len(part) > limits.body:
                    raise RequestError(413, problem)
                hold.resize(body.size + len(part))
                body.add(part)
    except TimeoutError:
        raise RequestError(408, f"the body did not arrive within {seconds:g} s") from None
    return body.view()


class HeldAnswer(Response):
    """An answer whose bytes count until its client has taken them."""

    def __init__(self, content: bytes, hold: Hold, media_type: str) -> None:
        super().__init__(content, media_type=media_type)
        self._hold = hold

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, piece by piece: each waits until most of the one before has been read."""
        try:
            start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            await send(start)
            for first in range(0, len(self.body), _PIECE):
                piece = bytes(self.body[first : first + _PIECE])
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._hold.release()


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
