"""The memory of a server from outside, and what its C library has of it by what the server says."""

from __future__ import annotations

import asyncio
import re

from benchmarks.harness.http_client import HttpConnection, request_of
from benchmarks.harness.server_process import ServerProcess

_PATIENCE = 4.0
_HEAP = re.compile(r'^tandemrec_heap_bytes\{kind="(\w+)"\} (\S+)$', re.MULTILINE)


async def memory_of(server: ServerProcess) -> dict[str, float]:
    """What `ServerProcess.memory` says, and `heap_used_mb` and `heap_free_mb`.

    The last two are missing where the server does not answer at once, or its C library does not tell.
    """
    return {**server.memory(), **await _heap_of(server)}


async def _heap_of(server: ServerProcess) -> dict[str, float]:
    connection = HttpConnection(server.host, server.port)
    try:
        async with asyncio.timeout(_PATIENCE):
            answer = await connection.ask(request_of("/metrics", "text/plain", b"", method="GET"))
    except (OSError, EOFError, TimeoutError):
        return {}
    finally:
        connection.close()
    return heap_in(answer.content.decode())


def heap_in(metrics: str) -> dict[str, float]:
    """`heap_used_mb` and `heap_free_mb` of what /metrics answers; empty where it says neither."""
    return {f"heap_{kind}_mb": float(size) / 1e6 for kind, size in _HEAP.findall(metrics)}
