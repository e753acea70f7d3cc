"""All that a running server holds; the paths are in `app` and the files beside it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from pipelines.serve.load import InFlight
from pipelines.serve.logs import Log
from pipelines.serve.metrics import Metrics
from pipelines.serve.settings import ServeSettings
from pipelines.serve.tokens import token_of
from pipelines.serve.updates import Updates
from trainer.serving.batcher import Batcher
from trainer.serving.versions import Versions

Result = TypeVar("Result")


class Service:
    """The versions, what scores by them, and what clients may take.

    Raises:
        ConfigError: the file of a token cannot be read.
    """

    def __init__(
        self,
        versions: Versions,
        metrics: Metrics,
        settings: ServeSettings | None = None,
        log: Log | None = None,
    ) -> None:
        self.settings = settings or ServeSettings()
        self.versions, self.metrics, self.log = versions, metrics, log or Log(self.settings.logs)
        self.limits, self.load = self.settings.limits.limits(), self.settings.load()
        self.started = time.monotonic()
        self.draining = False
        self.tasks: list[asyncio.Task[None]] = []
        self.batcher = Batcher(self.settings.batching.settings(), metrics.scored)
        self.in_flight = InFlight(self.load.in_flight)
        metrics.in_flight.set_function(lambda: self.in_flight.held)
        # One body at a time becomes larger, and the event loop goes on meanwhile.
        self.decoder = ThreadPoolExecutor(1, "decode")
        self.updates = Updates(versions, metrics, self.settings.updates.poll_seconds, self.log)
        access = self.settings.access

        def say(line: str) -> None:
            self.log.say("token", line)

        self.reload_token = token_of(access.reload_token_file, say)
        self.users_token = token_of(access.users_token_file, say)
        self.metrics_token = token_of(access.metrics_token_file, say)
        metrics.serving(versions.scorer)

    async def in_thread(self, work: Callable[..., Result], *given: Any) -> Result:
        """The result of work that may take long, done in the thread that decodes bodies."""
        return await asyncio.get_running_loop().run_in_executor(self.decoder, work, *given)

    def begin_drain(self) -> None:
        """Say at once that no more requests should be sent here; those that come are still scored."""
        self.draining = True

    def problem(self) -> str | None:
        """Why no requests should be sent here; None where all is well."""
        if any(task.done() for task in self.tasks):
            return "the server's own work has ended; start it anew"
        return "the server is about to end" if self.draining else None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Scores, and follows the versions, for as long as it is open."""
        self.tasks = [asyncio.create_task(self.batcher.run())]
        self.tasks += [asyncio.create_task(self.updates.poll())] if self.updates.seconds else []
        try:
            yield
        finally:
            for task in self.tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            self.decoder.shutdown()
