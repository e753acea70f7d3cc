"""How much a server takes in at once: bytes of bodies and answers over all connections, and time for each."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
from dataclasses import dataclass

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from trainer.serving.request import Limits, RequestError

# An answer is sent in pieces, so that a client that reads slowly is noticed before all of it is handed over.
_PIECE = 256 << 10
_SHORT = 64 << 10
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
