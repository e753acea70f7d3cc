"""Newer versions of the snapshot: looked for, taken, and told of, whatever goes wrong."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from embeddings.errors import TandemError
from pipelines.serve.logs import Log
from pipelines.serve.metrics import Metrics
from trainer.ranks.machine import return_freed_memory
from trainer.serving.scorer import Scorer
from trainer.serving.versions import Versions

T = TypeVar("T")
_LONGEST_WAIT = 60.0
# Between two looks whether anybody scores with an old version still.
_LAST_BODIES = 0.5


class Updates:
    """Switches to every newer version.

    Args:
        seconds: between two looks; 0 = only when asked.

    Attributes:
        problem: why the newest look failed, or None; failures: looks that failed since one did not.
    """

    def __init__(self, versions: Versions, metrics: Metrics, seconds: float, log: Log) -> None:
        self._versions, self._metrics, self.seconds, self._log = versions, metrics, seconds, log
        self.problem: str | None = None
        self.failures = 0
        self._clearing: set[asyncio.Task[None]] = set()
        # Always the same one: glibc keeps for each thread what its largest piece of work has taken.
        self._thread = ThreadPoolExecutor(1, "update")

    async def reload(self, retry: bool = True) -> bool:
        """Load in another thread; requests go on."""
        former = weakref.ref(self._versions.scorer)
        switched = await self._in_thread(lambda: self._versions.reload(retry))
        if switched:
            self._metrics.serving(self._versions.scorer)
            task = asyncio.create_task(self._clear(former))
            self._clearing.add(task)
            task.add_done_callback(self._clearing.discard)
        return switched

    async def poll(self) -> None:
        """Look for ever; after a failure ever less often, up to once a minute.

        A version that was refused is not tried again, and is no failure: the look was a success.
        """
        while self.seconds:
            wait = self.seconds * 2 ** min(self.failures, 20)
            await asyncio.sleep(min(wait, max(_LONGEST_WAIT, self.seconds)))
            try:
                await self._look()
            except Exception as error:
                problem = " ".join(f"{type(error).__name__}: {error}".split())[:500]
                self.failures += 1
                self._metrics.poll_failures.inc()
                self._metrics.poll_failing.set(1)
                # A problem is told once, not at every look: the disk of the log may be what is full.
                if problem != self.problem:
                    serving = f"still serving {self._versions.scorer.version}"
                    self._say("updates fail", f"{serving}; cannot look for newer versions: {problem}")
                self.problem = problem
                continue
            if self.problem is not None:
                self._say("updates work", "looking for newer versions works again")
            self.problem, self.failures = None, 0
            self._metrics.poll_failing.set(0)

    def close(self) -> None:
        """Wait for a version that is being loaded, and take no other."""
        for task in self._clearing:
            task.cancel()
        self._thread.shutdown(cancel_futures=True)

    async def _look(self) -> None:
        if await self._in_thread(self._versions.newer) is None:
            return
        before = self._versions.refused
        try:
            switched = await self.reload(retry=False)
        except TandemError as error:
            if self._versions.refused == before:
                raise
            self._say("version refused", f"still serving {self._versions.scorer.version}: {error}")
            return
        if switched:
            self._say("version served", f"now serving {self._versions.shown()}")

    def _say(self, event: str, message: str) -> None:
        self._log.say(event, message, version=self._versions.scorer.version)

    async def _clear(self, former: Callable[[], Scorer | None]) -> None:
        """Once nobody scores with an old version, give the memory that it had back to the system.

        Its states of users lay between blocks that are in use still, where the C library would keep the room.
        """
        while former() is not None:
            await asyncio.sleep(_LAST_BODIES)
        await self._in_thread(return_freed_memory)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
