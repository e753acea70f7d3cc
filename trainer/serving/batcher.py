"""Micro-batching: requests that wait while the model is busy are scored by one call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import torch

from trainer.serving.exploration import Exploration
from trainer.serving.request import Request, RequestError
from trainer.serving.scorer import Answer, Scorer, Seconds


@dataclass(frozen=True)
class BatchSettings:
    """How requests are put together.

    Attributes:
        window: seconds to wait for company; 0 = whoever came while the model was busy.
        requests, behaviors, candidates: most of one model call (one request is always scored whole).
        waiting: bodies that may wait; beyond, they are turned away with 429.
        threads: of the model.
    """

    window: float = 0.0
    requests: int = 32
    behaviors: int = 200_000
    candidates: int = 10_000
    waiting: int = 256
    threads: int = 1

    def fits(self, requests: Sequence[Request]) -> bool:
        """Whether one model call may score them together."""
        behaviors = sum(request.history.time.size for request in requests)
        candidates = sum(request.count for request in requests)
        return (
            len(requests) <= self.requests and behaviors <= self.behaviors and candidates <= self.candidates
        )


@dataclass(frozen=True, eq=False)
class Job:
    """One body: its requests were checked for this scorer, so no other may score them."""

    scorer: Scorer
    requests: Sequence[Request]
    explain: bool
    exploration: Exploration | None
    answer: asyncio.Future[list[Answer]]
    queued: float


# Called after every model call: its jobs, how long each had waited, where the time went.
Observe = Callable[[Sequence[Job], Sequence[float], Seconds], None]


class Batcher:
    """A queue in front of one scoring thread. `run` must be running."""

    def __init__(self, settings: BatchSettings, observe: Observe) -> None:
        self.settings, self._observe = settings, observe
        self._queue: asyncio.Queue[Job] = asyncio.Queue(settings.waiting)
        self._next: Job | None = None
        self._pool = ThreadPoolExecutor(1, "score", torch.set_num_threads, (settings.threads,))

    def check_room(self) -> None:
        """Raises RequestError (429) if too many are waiting."""
        if self._queue.full():
            raise RequestError(429, f"{self.settings.waiting} requests are waiting; try again")

    async def score(
        self,
        scorer: Scorer,
        requests: Sequence[Request],
        explain: bool,
        exploration: Exploration | None = None,
    ) -> list[Answer]:
        """One answer a request. Raises RequestError (429) if too many are waiting."""
        self.check_room()
        answer: asyncio.Future[list[Answer]] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(Job(scorer, requests, explain, exploration, answer, time.perf_counter()))
        return await answer

    async def run(self) -> None:
        """Score what comes, until cancelled; whatever goes wrong, its jobs are answered and others go on."""
        try:
            while True:
                await self._score_next(await self._next_jobs())
        finally:
            self._pool.shutdown(wait=True)

    async def _score_next(self, jobs: Sequence[Job]) -> None:
        waited = [time.perf_counter() - job.queued for job in jobs]
        outcomes: Sequence[list[Answer] | Exception]
        try:
            scoring = asyncio.get_running_loop().run_in_executor(self._pool, _score, jobs, self.settings)
            outcomes, seconds = await scoring
            self._observe(jobs, waited, seconds)
        except Exception as error:
            outcomes = [error] * len(jobs)
        for job, outcome in zip(jobs, outcomes, strict=True):
            if job.answer.done():  # cancelled: its client left
                continue
            if isinstance(outcome, Exception):
                job.answer.set_exception(outcome)
            else:
                job.answer.set_result(outcome)

    async def _next_jobs(self) -> list[Job]:
        """The next job, and those behind it that fit into its call, in order."""
        jobs = [self._next or await self._queue.get()]
        self._next = None
        if self.settings.window:
            await asyncio.sleep(self.settings.window)
        requests = list(jobs[0].requests)
        while not self._queue.empty():
            job = self._queue.get_nowait()
            requests += job.requests
            same = job.scorer is jobs[0].scorer and job.explain == jobs[0].explain
            if not same or not self.settings.fits(requests):
                self._next = job
                break
            jobs.append(job)
        return jobs


def _score(jobs: Sequence[Job], settings: BatchSettings) -> tuple[list[list[Answer] | Exception], Seconds]:
    """As few model calls as the limits allow, in order: the memory of a call grows with its candidates.

    If one fails, each job is scored alone, so that no job fails for another.
    """
    parts: list[list[tuple[Request, Exploration | None]]] = [[]]
    try:
        for one in ((request, job.exploration) for job in jobs for request in job.requests):
            if parts[-1] and not settings.fits([request for request, _ in [*parts[-1], one]]):
                parts.append([])
            parts[-1].append(one)
        calls = []
        for part in parts:
            requests, explore = zip(*part, strict=True)
            calls.append(jobs[0].scorer.score(requests, jobs[0].explain, explore))
    except Exception as error:
        if len(jobs) == 1:
            return [error], Seconds(0.0, 0.0)
        alone = [_score([job], settings) for job in jobs]
        return [outcomes[0] for outcomes, _ in alone], _total(each for _, each in alone)
    following = chain.from_iterable(answers for answers, _ in calls)
    return [[next(following) for _ in job.requests] for job in jobs], _total(each for _, each in calls)


def _total(calls: Iterable[Seconds]) -> Seconds:
    search, ranking = map(sum, zip(*calls, strict=True))
    return Seconds(search, ranking)
