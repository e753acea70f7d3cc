"""The clients of a soak: steady ones, and those that leave, dawdle, or send what cannot be scored."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import cycle

from benchmarks.harness.http_client import HttpConnection, request_of
from benchmarks.soak.accounts import Accounts
from benchmarks.soak.bodies import Body

# Longer than any deadline and time-out of the server: who waits that long waits in vain.
_PATIENCE = 90.0
_PIECES = 20
# A server closes connections that are idle for some seconds (uvicorn: 5), and what is sent at that moment is
# lost without a fault of its own. So no client uses one that has been idle for long.
_IDLE = 2.0
_BROKEN = (OSError, EOFError, TimeoutError)


class Traffic:
    """All clients of one server, until they are told to stop.

    Args:
        known, new: bodies of the steady clients, of which every tenth is of a new user.
        bad: requests that must be refused.
        seed: of who leaves when.
    """

    def __init__(
        self,
        address: tuple[str, int],
        accounts: Accounts,
        known: Sequence[Body],
        new: Iterator[Body],
        bad: Sequence[bytes],
        seed: int,
    ) -> None:
        self._address, self._accounts = address, accounts
        self._known, self._new, self._bad = known, new, cycle(bad)
        self._rng = random.Random(seed)
        self._idle: list[tuple[float, HttpConnection]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.latencies: list[float] = []
        self.stopped = asyncio.Event()

    async def run(self, rate: float) -> None:
        """Until `stopped`, and until the last answer has come.

        Args:
            rate: requests a second of the steady clients, whatever the server does.
        """
        kinds = (
            (1 / rate, self._steady), (1.0, self._leaver), (3.0, self._half), (5.0, self._slow),
            (1.0, self._mistaken), (10.0, self._scraper),
        )  # fmt: skip
        await asyncio.gather(*(self._repeat(seconds, client) for seconds, client in kinds))
        while self._tasks:
            await asyncio.wait(self._tasks)
        for _, connection in self._idle:
            connection.close()

    async def _repeat(self, seconds: float, client: Callable[[float], Awaitable[None]]) -> None:
        """Start a client at every multiple of some seconds: late answers make nobody send later."""
        due = time.perf_counter()
        while not self.stopped.is_set():
            task = asyncio.ensure_future(client(due))
            self._tasks.add(task)  # type: ignore[arg-type]
            task.add_done_callback(self._ended)
            due += seconds
            try:
                async with asyncio.timeout(max(due - time.perf_counter(), 0)):
                    await self.stopped.wait()
            except TimeoutError:
                continue

    def _ended(self, task: asyncio.Future[None]) -> None:
        self._tasks.discard(task)  # type: ignore[arg-type]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._accounts.lose("client", f"failed: {error!r}")

    async def _steady(self, due: float) -> None:
        body = next(self._new) if self._rng.random() < 0.1 else self._rng.choice(self._known)
        connection = self._connection()
        try:
            async with asyncio.timeout(_PATIENCE):
                answer = await connection.ask(body.sent)
        except _BROKEN as error:
            self._accounts.lose("steady", f"no answer: {error!r}")
            return
        self.latencies.append(time.perf_counter() - due)
        self._accounts.scored("steady", body, answer)
        self._idle.append((time.perf_counter(), connection))

    def _connection(self) -> HttpConnection:
        """The one that was used last, or a new one."""
        used, connection = self._idle.pop() if self._idle else (0.0, HttpConnection(*self._address))
        if time.perf_counter() - used <= _IDLE:
            return connection
        connection.close()
        return HttpConnection(*self._address)

    async def _leaver(self, _: float) -> None:
        """Sends all of a body and does not wait for the answer."""
        await self._abandon(self._rng.choice(self._known).sent, self._rng.random() / 20, "leaves")

    async def _half(self, _: float) -> None:
        """Sends half of a body, and leaves a second later."""
        whole = self._rng.choice(self._known).sent
        await self._abandon(whole[: len(whole) // 2], 1.0, "leaves in the middle")

    async def _abandon(self, sent: bytes, seconds: float, kind: str) -> None:
        connection = HttpConnection(*self._address)
        try:
            _, writer = await connection.open()
            writer.write(sent)
            await asyncio.sleep(seconds)
            self._accounts.note(kind, "left")
        except _BROKEN as error:
            self._accounts.lose(kind, f"could not even connect: {error!r}")
        finally:
            connection.close()

    async def _slow(self, _: float) -> None:
        """Sends a body piece by piece over some seconds, and reads the answer."""
        body = self._rng.choice(self._known)
        connection = HttpConnection(*self._address)
        size = -(-len(body.sent) // _PIECES)
        try:
            async with asyncio.timeout(_PATIENCE):
                _, writer = await connection.open()
                for first in range(0, len(body.sent), size):
                    writer.write(body.sent[first : first + size])
                    await writer.drain()
                    await asyncio.sleep(0.1)
                self._accounts.scored("slow", body, await connection.answer())
        except _BROKEN as error:
            self._accounts.lose("slow", f"no answer: {error!r}")
        finally:
            connection.close()

    async def _mistaken(self, _: float) -> None:
        await self._ask_once("mistaken", next(self._bad))

    async def _scraper(self, _: float) -> None:
        """Asks for metrics and readiness, as what watches a server does."""
        for path in ("/metrics", "/readyz", "/healthz"):
            await self._ask_once("watching", request_of(path, "text/plain", b"", method="GET"))

    async def _ask_once(self, kind: str, sent: bytes) -> None:
        connection = HttpConnection(*self._address)
        try:
            async with asyncio.timeout(_PATIENCE):
                answer = await connection.ask(sent)
        except _BROKEN as error:
            self._accounts.lose(kind, f"no answer: {error!r}")
            return
        finally:
            connection.close()
        if kind == "mistaken":
            self._accounts.refused(kind, answer)
        elif answer.status == 200:
            self._accounts.note(kind, "answered")
        else:
            self._accounts.lose(kind, f"answered {answer.status}: {answer.content[:200]!r}")
