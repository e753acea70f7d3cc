"""Micro-batching: requests that wait while the model is busy are scored by one call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from trainer.serving.request import Request, RequestError
from trainer.serving.scorer import Scored, Scorer, Seconds


@dataclass(frozen=True)
class BatchSettings:
    """How requests are put together.

    Attributes:
        window: seconds to wait for company; 0 = whoever came while the model was busy.
        requests, behaviors: most of one call (one body is always scored whole).
        waiting: bodies that may wait; beyond, they are turned away with 429.
        threads: of the model.
    """

    window: float = 0.0
    requests: int = 32
    behaviors: int = 200_000
    waiting: int = 256
    threads: int = 1


@dataclass(frozen=True, eq=False)
class Job:
    """One body: its requests were checked for this scorer, so no other may score them."""

    scorer: Scorer
    requests: Sequence[Request]
    explain: bool
    answer: asyncio.Future[list[Scored]]
    queued: float

    @property
    def behaviors(self) -> int:
        return sum(request.history.time.size for request in self.requests)


# Called after every model call: its jobs, how long each had waited, where the time went.
Observe = Callable[[Sequence[Job], Sequence[float], Seconds], None]


class Batcher:
    """A queue in front of one scoring thread. `run` must be running."""

    def __init__(self, settings: BatchSettings, observe: Observe) -> None:
        self.settings, self._observe = settings, observe
        self._queue: asyncio.Queue[Job] = asyncio.Queue(settings.waiting)
        self._next: Job | None = None
        self._pool = ThreadPoolExecutor(1, "score", torch.set_num_threads, (settings.threads,))

    async def score(self, scorer: Scorer, requests: Sequence[Request], explain: bool) -> list[Scored]:
        """Raises RequestError (429) if too many are waiting."""
        answer: asyncio.Future[list[Scored]] = asyncio.get_running_loop().create_future()
        job = Job(scorer, requests, explain, answer, time.perf_counter())
        try:
            self._queue.put_nowait(job)
        except asyncio.QueueFull:
            raise RequestError(429, f"{self.settings.waiting} requests are waiting; try again") from None
        return await answer

    async def run(self) -> None:
        """Score what comes, until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                jobs = await self._company()
                waited = [time.perf_counter() - job.queued for job in jobs]
                outcomes, seconds = await loop.run_in_executor(self._pool, _score, jobs)
                self._observe(jobs, waited, seconds)
                for job, outcome in zip(jobs, outcomes, strict=True):
                    _settle(job.answer, outcome)
        finally:
            self._pool.shutdown(wait=True)

    async def _company(self) -> list[Job]:
        """The next job, and those behind it that fit into its call, in order."""
        jobs = [self._next or await self._queue.get()]
        self._next = None
        if self.settings.window:
            await asyncio.sleep(self.settings.window)
        requests, behaviors = len(jobs[0].requests), jobs[0].behaviors
        while not self._queue.empty():
            job = self._queue.get_nowait()
            requests, behaviors = requests + len(job.requests), behaviors + job.behaviors
            same = job.scorer is jobs[0].scorer and job.explain == jobs[0].explain
            if not same or requests > self.settings.requests or behaviors > self.settings.behaviors:
                self._next = job
                break
            jobs.append(job)
        return jobs


def _score(jobs: Sequence[Job]) -> tuple[list[list[Scored] | Exception], Seconds]:
    """One call for all jobs. If it fails, each gets a call of its own, so that no job fails for another."""
    requests = [request for job in jobs for request in job.requests]
    try:
        scored, seconds = jobs[0].scorer.score(requests, jobs[0].explain)
    except Exception as error:
        if len(jobs) == 1:
            return [error], Seconds(0.0, 0.0)
        alone = [_score([job]) for job in jobs]
        search, ranking = (sum(part) for part in zip(*(seconds for _, seconds in alone), strict=True))
        return [outcomes[0] for outcomes, _ in alone], Seconds(search, ranking)
    answers = iter(scored)
    return [[next(answers) for _ in job.requests] for job in jobs], seconds


def _settle(answer: asyncio.Future[list[Scored]], outcome: list[Scored] | Exception) -> None:
    if answer.done():  # cancelled: its client left
        return
    if isinstance(outcome, Exception):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)
