"""uvicorn's server with an end in steps: not ready, no new connection, then what was accepted is finished."""

from __future__ import annotations

import asyncio
import time
from types import FrameType
from typing import Any

import uvicorn

from pipelines.serve.service import Service

_LOOK, _LAST_TASKS = 0.02, 5.0


class Server(uvicorn.Server):
    """Serves until a signal, and says where it listens: with port 0 only then is it known."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service, self._drain = service, service.settings.drain
        self._ends_at: float | None = None

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            address = f"http://{self.config.host}:{self.servers[0].sockets[0].getsockname()[1]}"
            versions = self._service.versions
            message = f"serving {versions.shown()} on {address}"
            self._service.log.say("serving", message, version=versions.scorer.version, http=address)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not ready from now on; a second signal ends the time in which connections are still accepted."""
        again = self._ends_at is not None
        if not again:
            self._captured_signals.append(sig)
            self._service.core.begin_drain()
        self._ends_at = time.monotonic() + (0.0 if again else self._drain.delay_seconds)

    async def on_tick(self, counter: int) -> bool:
        over = self._ends_at is not None and time.monotonic() >= self._ends_at
        return await super().on_tick(counter) or over

    async def shutdown(self, sockets: Any = None) -> None:
        """Close what listens and what is idle; wait for the others, and cut off those that take too long."""
        for server in self.servers:
            server.close()
        state = self.server_state
        for connection in list(state.connections):
            connection.shutdown()
        end = time.monotonic() + self._drain.seconds
        while (state.connections or state.tasks) and time.monotonic() < end:
            await asyncio.sleep(_LOOK)
        if state.connections:
            count, seconds = len(state.connections), self._drain.seconds
            problem = f"{count} connections were cut off {seconds:g} s after the server began to end"
            self._service.log.say("cut off", problem, connections=count)
        for connection in list(state.connections):
            connection.transport.abort()
        # The tasks of connections that are gone have been cancelled.
        end = time.monotonic() + _LAST_TASKS
        while state.tasks and time.monotonic() < end:
            await asyncio.sleep(_LOOK)
        await self.lifespan.shutdown()
