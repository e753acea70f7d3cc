"""The client of a load test, in a process of its own: `python -m benchmarks.serve.client SPEC.json`.

A closed loop has so many connections, each of which asks again as soon as it is answered: it finds the most
that a server can do. In an open loop requests are sent at constant intervals, whatever the server does, and a
latency counts from the moment at which a request was to be sent. Where a server stalls, all requests of that
time are late, and all of them count ("coordinated omission" leaves them out). What the client itself takes is
told: its share of a core, and how late it sends.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import uvloop
from pydantic import BaseModel

from benchmarks.harness.http_client import HttpConnection

_BROKEN = (OSError, EOFError, TimeoutError)
# Whoever waits longer has lost the request.
_PATIENCE = 60.0


class LoadSpec(BaseModel):
    """What the client does.

    Attributes:
        kind: of the server's interface; port: where it listens on this machine.
        bodies: folders with whole requests (HTTP) or messages (gRPC), one a file; a request is of a folder by
            its `share`, of the folder's files in turn, from number `first` on.
        connections: of the closed loop, or the most of the open one. rate: requests a second; None: closed.
        seconds: of the measurement, after `warm` that do not count.
    """

    kind: str
    port: int
    bodies: list[Path]
    share: list[float] = [1.0]
    first: int = 0
    connections: int
    rate: float | None = None
    seconds: float
    warm: float = 0.5
    seed: int = 0


class Asker(Protocol):
    """Sends a request and waits; -> its status as text."""

    async def ask(self, request: bytes) -> str: ...

    def close(self) -> None: ...


class HttpAsker:
    """One connection of HTTP/1.1."""

    def __init__(self, port: int) -> None:
        self._connection = HttpConnection("127.0.0.1", port)

    async def ask(self, request: bytes) -> str:
        return str((await self._connection.ask(request)).status)

    def close(self) -> None:
        self._connection.close()


class GrpcAsker:
    """One channel of gRPC; messages are bytes already."""

    def __init__(self, port: int) -> None:
        import grpc

        # Channels with the same options would share a connection.
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options)
        self._call = self._channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        self._error = grpc.aio.AioRpcError

    async def ask(self, request: bytes) -> str:
        try:
            await self._call(request)
        except self._error as error:
            return str(error.code().name)
        return "200"

    def close(self) -> None:
        # The channel ends with the process.
        return


ASKERS: dict[str, Callable[[int], Asker]] = {"http": HttpAsker, "grpc": GrpcAsker}


class Load:
    """One measurement."""

    def __init__(self, spec: LoadSpec) -> None:
        self.spec = spec
        self._rng = random.Random(spec.seed)
        self._bodies = [[file.read_bytes() for file in sorted(each.iterdir())] for each in spec.bodies]
        self._turn = [spec.first] * len(self._bodies)
        self._askers: list[Asker] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.latencies: list[float] = []
        self.late: list[float] = []
        self.outcomes: Counter[str] = Counter()
        # All answers, those that do not count among them.
        self.answered = 0
        self.began = 0.0

    async def run(self) -> dict[str, Any]:
        """Measure; -> what was found."""
        # What they import is no part of the measurement.
        askers = [self._asker() for _ in range(self.spec.connections)]
        if self.spec.warm:
            # For the first body of a form a server may have to import what reads it.
            askers[0] = await self._one(askers[0], -math.inf)
        self.began = time.perf_counter() + self.spec.warm
        cpu = time.process_time()
        await (self._closed(askers) if self.spec.rate is None else self._open(askers, self.spec.rate))
        whole = time.perf_counter() - self.began + self.spec.warm
        for asker in self._askers:
            asker.close()
        return {
            "latencies": self.latencies,
            "outcomes": dict(self.outcomes),
            "seconds": self.spec.seconds if self.spec.rate is None else whole - self.spec.warm,
            "answered": self.answered,
            "client_cores": (time.process_time() - cpu) / whole,
            "late": self.late,
        }

    async def _closed(self, askers: Sequence[Asker]) -> None:
        end = self.began + self.spec.seconds

        async def again(asker: Asker) -> None:
            while (now := time.perf_counter()) < end:
                asker = await self._one(asker, now)

        await asyncio.gather(*(again(asker) for asker in askers))

    async def _open(self, askers: Sequence[Asker], rate: float) -> None:
        """Every request has its moment from the start on. No connection free: it waits, and its time runs."""
        free: asyncio.Queue[Asker] = asyncio.Queue()
        for asker in askers:
            free.put_nowait(asker)
        start = self.began - self.spec.warm
        for number in range(int(rate * (self.spec.warm + self.spec.seconds))):
            due = start + number / rate
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            self.late.append(max(time.perf_counter() - due, 0.0))
            task = asyncio.ensure_future(self._queued(free, due))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await asyncio.gather(*self._tasks)

    async def _queued(self, free: asyncio.Queue[Asker], due: float) -> None:
        asker = await free.get()
        free.put_nowait(await self._one(asker, due))

    async def _one(self, asker: Asker, due: float) -> Asker:
        """Ask once; -> who asks next, another one where the connection is lost."""
        body = self._body()
        try:
            async with asyncio.timeout(_PATIENCE):
                status = await asker.ask(body)
        except _BROKEN as error:
            status = type(error).__name__
            asker.close()
            asker = self._asker()
        now = time.perf_counter()
        self.answered += status == "200"
        if self._counts(due, now):
            self.outcomes[status] += 1
            if status == "200":
                self.latencies.append(now - due)
        return asker

    def _counts(self, due: float, now: float) -> bool:
        """Of a closed loop, what ended while it was measured; of an open one, what was due then."""
        if self.spec.rate is None:
            return self.began <= now <= self.began + self.spec.seconds
        return due >= self.began

    def _asker(self) -> Asker:
        made = ASKERS[self.spec.kind](self.spec.port)
        self._askers.append(made)
        return made

    def _body(self) -> bytes:
        (at,) = self._rng.choices(range(len(self._bodies)), self.spec.share)
        files = self._bodies[at]
        self._turn[at] += 1
        return files[self._turn[at] % len(files)]


def main() -> None:
    path = Path(sys.argv[1])
    load = Load(LoadSpec.model_validate_json(path.read_text()))
    found = uvloop.run(load.run())
    path.with_suffix(".found").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
