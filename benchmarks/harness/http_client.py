"""A client of HTTP/1.1 that costs little: bytes that were made before, over connections that stay open.

It reads answers whose length is said, as the servers that are measured say it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

_HEAD_END, _LENGTH = b"\r\n\r\n", b"content-length:"


@dataclass(frozen=True)
class HttpAnswer:
    """Status and content of an answer; `closes`: the server ends the connection after it."""

    status: int
    content: bytes
    closes: bool


def head_of(path: str, content_type: str, length: int, *more: str, method: str = "POST") -> bytes:
    """The head of a request with a body of so many bytes."""
    lines = [f"{method} {path} HTTP/1.1", "host: bench", f"content-type: {content_type}"]
    return "\r\n".join([*lines, f"content-length: {length}", *more, "", ""]).encode()


def request_of(path: str, content_type: str, body: bytes, *more: str, method: str = "POST") -> bytes:
    """A whole request; `more`: further lines of its head."""
    return head_of(path, content_type, len(body), *more, method=method) + body


class HttpConnection:
    """One connection, with one request under way at a time. It is opened when it is first needed."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Both ends, connected now if they are not."""
        if self._reader is None or self._writer is None or self._writer.is_closing():
            self._reader, self._writer = await asyncio.open_connection(*self._address, limit=1 << 24)
        return self._reader, self._writer

    async def ask(self, request: bytes) -> HttpAnswer:
        """Send a request and wait for its answer.

        Raises:
            OSError, EOFError: there is no whole answer.
        """
        _, writer = await self.open()
        try:
            writer.write(request)
            await writer.drain()
            return await self.answer()
        except BaseException:
            self.close()
            raise

    async def answer(self) -> HttpAnswer:
        """The answer to what was sent."""
        reader, _ = await self.open()
        head = (await reader.readuntil(_HEAD_END)).lower()
        length = 0
        if (at := head.find(_LENGTH)) >= 0:
            length = int(head[at + len(_LENGTH) : head.index(b"\r\n", at)])
        content = await reader.readexactly(length) if length else b""
        closes = b"connection: close" in head
        if closes:
            self.close()
        return HttpAnswer(int(head[9:12]), content, closes)

    def close(self) -> None:
        """Leave, whatever is under way."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None
