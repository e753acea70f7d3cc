"""Connections of HTTP with bounds: how many, how long a client may take, and how a body may be cut up.

uvicorn leaves a connection open for ever whose client sends half a head, or does not read its answer. The
bounds are a class of their own, `Bounded`, which another protocol class of uvicorn may take as its first
base.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pipelines.serve.load import LoadLimits

_LONGEST_HEAD = 64 << 10
_FEW_PARTS, _SHORT_PART = 1_000, 256
# With this message the task of a request is cancelled whose client has left.
LEFT = "the client has left"
# Seconds for which a client may go on to send a head that was refused, so that it reads the answer.
_LINGER = 1.0
# Seconds that a body which is on its way when the server ends may still take.
_LAST_BODY = 1.0


@dataclass(frozen=True)
class Notices:
    """What a connection tells the server.

    Attributes:
        refused: gets the status of every answer that a connection gives by itself.
        left: called where a client leaves before its answer.
    """

    refused: Callable[[int], None]
    left: Callable[[], None]


class Crumbs:
    """Counts the parts of a body: each costs some 30 microseconds, however few bytes it brings."""

    def __init__(self) -> None:
        self._parts = self._bytes = 0

    def add(self, size: int) -> bool:
        """Count one part; whether the body is cut too small."""
        self._parts, self._bytes = self._parts + 1, self._bytes + size
        return self._parts > _FEW_PARTS + self._bytes / _SHORT_PART


class _OwnTasks:
    """The tasks of all connections, as uvicorn keeps them, and the newest of this one."""

    def __init__(self, of_all: set[asyncio.Task[None]]) -> None:
        self._all = of_all
        self.newest: asyncio.Task[None] | None = None

    def add(self, task: asyncio.Task[None]) -> None:
        self.newest = task
        self._all.add(task)

    def discard(self, task: asyncio.Task[None]) -> None:
        self._all.discard(task)

    def __len__(self) -> int:
        return len(self._all)


class Bounded(asyncio.Protocol):
    """The bounds of one connection, in front of a protocol class of uvicorn.

    A subclass by `protocol` knows the limits.
    """

    limits = LoadLimits()
    notices: Notices
    # Of uvicorn's protocol classes.
    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    connections: set[Any]
    cycle: Any
    flow: Any
    tasks: Any
    _turned_away = _lingers = False
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _last_timer: asyncio.TimerHandle | None = None

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.tasks = _OwnTasks(self.tasks)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The first head must come in time."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._turned_away = True
            most = f"{self.limits.connections} connections are open (http.connections)"
            self.refuse(503, f"{most}; try again")
        else:
            self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """What works for a client that has left is ended."""
        self._head_timer = _cancelled(self._head_timer)
        self._write_timer = _cancelled(self._write_timer)
        self._last_timer = _cancelled(self._last_timer)
        waits = not self.answered()
        super().connection_lost(exc)
        if waits and self.tasks.newest is not None:
            if not self._turned_away:
                self.notices.left()
            self.tasks.newest.cancel(LEFT)

    def answered(self) -> bool:
        """Whether no answer is owed."""
        return self.cycle is None or self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        """Between two requests the clock of a head runs, until the head has come whole.

        What is left of a body that was answered before its end counts as time for the next head.
        """
        if self._turned_away:
            return
        super().data_received(data)
        self._watch_head()

    def _watch_head(self) -> None:
        if not self.answered():
            self._head_timer = _cancelled(self._head_timer)
        elif self._head_timer is None:
            problem = f"no request came within {self.limits.seconds:g} s"
            self._head_timer = self.loop.call_later(self.limits.seconds, self.refuse, 408, problem)

    def pause_writing(self) -> None:
        """The client does not read as fast as it is answered."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.limits.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.answered():
            self._write_timer = _cancelled(self._write_timer)

    def on_response_complete(self) -> None:
        """A client that has taken the whole answer has no more time to keep."""
        if not self.flow.write_paused:
            self._write_timer = _cancelled(self._write_timer)
        super().on_response_complete()  # type: ignore[misc]

    def shutdown(self) -> None:
        """Answer what has come whole, then close. A body that is on its way has a second more."""
        super().shutdown()  # type: ignore[misc]
        if not self.answered() and self.cycle.more_body and self._last_timer is None:
            problem = "the server ends, and the body has not come whole"
            self._last_timer = self.loop.call_later(_LAST_BODY, self._refuse_part, 503, problem)

    def _refuse_part(self, status: int, problem: str) -> None:
        if self.cycle.more_body:
            self.refuse(status, problem)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, as one line of JSON as other errors are."""
        self.refuse(400, "this is no valid HTTP request")

    def refuse(self, status: int, problem: str, linger: bool = False) -> None:
        """Answer with an error, without the application, and close."""
        if self.transport.is_closing() or self._lingers:
            return
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()
            return
        self._turned_away = True
        self.notices.refused(status)
        body = json.dumps({"error": problem}).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        if not linger:
            self.transport.close()
            return
        self._lingers = True
        self._head_timer = _cancelled(self._head_timer)
        self.transport.write_eof()
        self._last_timer = self.loop.call_later(_LINGER, self.transport.close)


class BoundedHttptools(Bounded, HttpToolsProtocol):
    """One connection, read by httptools, which takes a quarter of the time of h11.

    httptools keeps a head for as long as it comes, so its bytes are counted here.
    """

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._crumbs = Crumbs()
        self._in_body = False
        self._head_bytes = 0

    def data_received(self, data: bytes) -> None:
        """A head that is too long is refused before it has come whole.

        What comes at once may be longer than a head: httptools is given as much as a head may still have.
        """
        while not self._in_body and not self._turned_away and self._head_bytes + len(data) > _LONGEST_HEAD:
            room = _LONGEST_HEAD - self._head_bytes
            self._head_bytes = _LONGEST_HEAD
            if room:
                super().data_received(data[:room])
                data = data[room:]
            if not self._in_body and self._head_bytes == _LONGEST_HEAD and not self._turned_away:
                self._refuse_head()
                return
        if not self._in_body:
            self._head_bytes += len(data)
        super().data_received(data)

    def _refuse_head(self) -> None:
        """Answer, and let the client end what it sends: with bytes unread, closing would reset the connection
        before the client has read the answer.
        """
        self.refuse(400, f"the head of the request is longer than {_LONGEST_HEAD:,} bytes", linger=True)

    def on_headers_complete(self) -> None:
        """The head has come whole; what follows in the same bytes is no part of it."""
        self._in_body, self._head_bytes, self._crumbs = True, 0, Crumbs()
        if not self._turned_away:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of a body; after many of a few bytes the connection is closed."""
        if self._turned_away:
            return
        if self._crumbs.add(len(body)):
            self.send_400_response("a body in chunks of a few bytes")
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Whatever the length of the body: without reading on nobody would see that the client leaves."""
        self._in_body = False
        if self._turned_away:
            return
        super().on_message_complete()
        if not self.pipeline:
            self.flow.resume_reading()

    def refuse(self, status: int, problem: str, linger: bool = False) -> None:
        """Not in the middle of answers to requests that were sent before, without waiting for theirs."""
        if self.pipeline:
            self.transport.abort()
            return
        super().refuse(status, problem, linger)


def protocol(limits: LoadLimits, notices: Notices) -> type[asyncio.Protocol]:
    """The class that uvicorn makes connections of."""
    members: dict[str, Any] = {"limits": limits, "notices": notices}
    return cast("type[asyncio.Protocol]", type("BoundedByLimits", (BoundedHttptools,), members))


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """None, in place of a timer that must not go off."""
    if timer is not None:
        timer.cancel()
    return None
