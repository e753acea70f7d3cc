"""uvicorn's server with an end in steps: not ready, no new connection, then what was accepted is finished."""

from __future__ import annotations

import asyncio
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from pipelines.serve.service import Service

if TYPE_CHECKING:
    from pipelines.serve.oip.grpc_server import GrpcServer

_LOOK, _LAST_TASKS = 0.02, 5.0


class Server(uvicorn.Server):
    """Serves until a signal, and says where it listens: with port 0 only then is it known."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service, self._drain = service, service.settings.drain
        self._grpc: GrpcServer | None = None
        service.connections = self.server_state.connections
        self._ends_at: float | None = None
        self._said = False

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if not self.started:
            return
        host = self.config.host
        address = f"http://{host}:{self.servers[0].sockets[0].getsockname()[1]}"
        fields = {"version": self._service.versions.scorer.version, "http": address}
        if self._service.settings.grpc.port is not None:
            # Importing gRPC takes time, and most servers do without it.
            from pipelines.serve.oip.grpc_server import GrpcServer

            self._grpc = GrpcServer(self._service)
            await self._grpc.start()
            fields["grpc"] = f"{host}:{self._grpc.port}"
        also = f"and gRPC on {fields['grpc']}, HTTP" if "grpc" in fields else ""
        where = " ".join(filter(None, (f"serving {self._service.versions.shown()}", also, f"on {address}")))
        self._service.log.say("serving", where, **fields)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not ready from now on; a second signal ends the time in which connections are still accepted."""
        again = self._ends_at is not None
        if not again:
            self._service.core.begin_drain()
        self._ends_at = time.monotonic() + (0.0 if again else self._drain.delay_seconds)

    def _say_draining(self) -> None:
        """Once, and not from the handler of a signal, which may come in the middle of another line."""
        if not self._said:
            self._said = True
            problem = f"draining {self._service.versions.scorer.version}: a signal came, the server will end"
            self._service.log.say("draining", problem, version=self._service.versions.scorer.version)

    async def on_tick(self, counter: int) -> bool:
        if self._ends_at is not None:
            self._say_draining()
        over = self._ends_at is not None and time.monotonic() >= self._ends_at
        return await super().on_tick(counter) or over

    async def shutdown(self, sockets: Any = None) -> None:
        """Close what listens and what is idle; wait for the others, and cut off those that take too long."""
        self._say_draining()
        for server in self.servers:
            server.close()
        state = self.server_state
        for connection in list(state.connections):
            connection.shutdown()
        end = time.monotonic() + self._drain.seconds
        stopping = None if self._grpc is None else asyncio.create_task(self._grpc.stop(self._drain.seconds))
        while (state.connections or state.tasks) and time.monotonic() < end:
            await asyncio.sleep(_LOOK)
        if state.connections:
            count, seconds = len(state.connections), self._drain.seconds
            problem = f"{count} connections were cut off {seconds:g} s after the server began to end"
            self._service.log.say("cut off", problem, connections=count)
        for connection in list(state.connections):
            connection.transport.abort()
        # The tasks of connections that are gone have been cancelled.
        if stopping is not None:
            await stopping
        end = time.monotonic() + _LAST_TASKS
        while state.tasks and time.monotonic() < end:
            await asyncio.sleep(_LOOK)
        await self.lifespan.shutdown()
        version = self._service.versions.scorer.version
        self._service.log.say("ended", "the server has ended", version=version)
