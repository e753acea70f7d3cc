"""Bodies and answers over HTTP: read and sent piece by piece, and counted while they are held."""

from __future__ import annotations

import asyncio
import mmap

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from pipelines.serve.load import Hold
from trainer.serving.request import Limits, RequestError

# An answer is sent in pieces, so that a client that reads slowly is noticed before all of it is handed over.
_PIECE = 256 << 10
# A shorter one is less than what a connection takes without a wait, so there is no end to be waited for.
_AT_ONCE = 16 << 10
# Longer bodies get pages of their own. For shorter ones that takes longer than to join their parts.
_SHORT = 1 << 20


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
    problem = f"the body is longer than {limits.body:,} bytes (limits.body)"
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
            if len(self.body) <= _AT_ONCE:
                await send({"type": "http.response.body", "body": self.body, "more_body": False})
                return
            for first in range(0, len(self.body), _PIECE):
                piece = bytes(self.body[first : first + _PIECE])
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._hold.release()
