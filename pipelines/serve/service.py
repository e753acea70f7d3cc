"""All that a running server holds; the paths are in `app` and the files beside it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress

from pipelines.serve.gauges import Gauges
from pipelines.serve.load import InFlight
from pipelines.serve.logs import Log
from pipelines.serve.metrics import Metrics
from pipelines.serve.settings import ServeSettings
from pipelines.serve.tokens import token_of
from pipelines.serve.updates import Updates
from trainer.serving.core import CoreSettings, ScoringCore
from trainer.serving.request import Limits
from trainer.serving.user_state.cache import Statistics
from trainer.serving.user_state.second_level import SecondLevel
from trainer.serving.versions import Versions


class Service:
    """The versions, what scores by them, and what clients may take.

    Attributes:
        shared: the second level of user states, None where there is none.

    Raises:
        ConfigError: the file of a token cannot be read.
    """

    def __init__(
        self,
        versions: Versions,
        metrics: Metrics,
        settings: ServeSettings | None = None,
        log: Log | None = None,
        shared: SecondLevel | None = None,
    ) -> None:
        self.shared = shared
        self.settings = settings or ServeSettings()
        self.versions, self.metrics, self.log = versions, metrics, log or Log(self.settings.logs)
        metrics.log = self.log
        self.load = self.settings.load()
        self.started = time.monotonic()
        self.tasks: list[asyncio.Task[None]] = []
        # Of the server that listens; none where the paths are called in process.
        self.connections: Collection[object] = ()
        core = CoreSettings(self.settings.limits.limits(), self.settings.batching.settings())
        self.core = ScoringCore(versions, core, metrics)
        self.in_flight = InFlight(self.load.in_flight)
        metrics.watch(Gauges(self))
        self.updates = Updates(versions, metrics, self.settings.updates.poll_seconds, self.log)
        access = self.settings.access

        def say(line: str) -> None:
            self.log.say("token", line)

        self.reload_token = token_of(access.reload_token_file, say)
        self.users_token = token_of(access.users_token_file, say)
        self.metrics_token = token_of(access.metrics_token_file, say)
        metrics.serving(versions.scorer)

    @property
    def limits(self) -> Limits:
        """Of one body, as the core has them now."""
        return self.core.settings.limits

    def state_statistics(self) -> Statistics | None:
        """Of what is kept of users between their requests; None where nothing is."""
        states = self.versions.scorer.states
        return None if states is None else states.cache.statistics()

    def traced(self, name: str, headers: Mapping[str, str]) -> AbstractContextManager[None]:
        """The span of a body while it is open; see `Tracer.body`."""
        tracer = self.metrics.tracer
        return nullcontext() if tracer is None else tracer.body(name, headers)

    def problem(self) -> str | None:
        """Why no requests should be sent here; None where all is well."""
        if not self.live():
            return "the server's own work has ended; start it anew"
        return "; ".join(self.core.state.problems) or None

    def live(self) -> bool:
        """Whether the server's own work goes on; else only a new process helps."""
        return self.core.state.live and not any(task.done() for task in self.tasks)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Scores, and follows the versions, for as long as it is open."""
        self.tasks = [asyncio.create_task(self.core.run())]
        self.tasks += [asyncio.create_task(self.updates.poll())] if self.updates.seconds else []
        try:
            yield
        finally:
            for task in self.tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            self.updates.close()
