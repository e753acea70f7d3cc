"""Scoring as a service, without a protocol: bodies come in, answers go out, and the model is never idle.

Adapters for HTTP, gRPC and others know this class alone. Whoever awaits an answer and is cancelled, because a
client left, takes the body out of the queue.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from trainer.serving import arrow_body
from trainer.serving.body import Body, decode, encode
from trainer.serving.call import JSON, Call, Reply
from trainer.serving.cost import PAIRS_OF_CANDIDATE, cost_of
from trainer.serving.model_calls import Scored, score_parts
from trainer.serving.observer import ModelCall, Observer
from trainer.serving.pace import Pace
from trainer.serving.request import Limits, RequestError
from trainer.serving.scheduler import BatchSettings, BodyPart, Scheduler, Size, Work
from trainer.serving.scorer import Answer
from trainer.serving.versions import Versions

Result = TypeVar("Result")


@dataclass(frozen=True)
class CoreSettings:
    """What one body may ask for, and how bodies share the model."""

    limits: Limits = field(default_factory=Limits)
    batching: BatchSettings = field(default_factory=BatchSettings)


@dataclass(frozen=True)
class State:
    """Whether the core works.

    Attributes:
        live: what scores is running; otherwise only a new process helps.
        ready: it may get traffic; problems: why it may not, one sentence each.
        draining: it was asked to end.
    """

    live: bool
    ready: bool
    draining: bool
    problems: tuple[str, ...]


@dataclass(eq=False)
class _Waiting:
    """A body in the queue, and the answers to the parts of it that were scored."""

    body: Body
    answer: asyncio.Future[list[Answer]]
    answers: list[Answer] = field(default_factory=list)


class ScoringCore:
    """Decodes, schedules, scores and encodes. `run` must be running.

    Args:
        versions: says which scorer is in use.
        observe: is told of everything that counts.

    Attributes:
        settings: may be replaced while it runs; bodies in the queue keep what they came with.
    """

    def __init__(
        self, versions: Versions, settings: CoreSettings | None = None, observe: Observer | None = None
    ) -> None:
        self.versions = versions
        self.settings, self.observe = settings or CoreSettings(), observe or Observer()
        self.clock = time.monotonic
        self._scheduler, self._pace = Scheduler(self.settings.batching), Pace()
        self._arrived, self._idle = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._ended = self._draining = self._closed = False
        # Bodies that are decoded, wait, are scored or encoded.
        self._taken = 0
        threads = self.settings.batching.threads
        self._model = ThreadPoolExecutor(1, "score", torch.set_num_threads, (threads,))
        # One body at a time becomes larger, and the event loop goes on meanwhile.
        self._decoder = ThreadPoolExecutor(1, "decode")

    @property
    def state(self) -> State:
        """Whether requests are scored, and may come."""
        problems = []
        if self._ended:
            problems.append("what scores has ended; start the server anew")
        if self._draining:
            problems.append("the server is about to end")
        return State(not self._ended, not problems, self._draining, tuple(problems))

    async def run(self) -> None:
        """Score what comes, until cancelled; whatever goes wrong, its bodies are told and others go on."""
        try:
            while True:
                await self._company()
                await self._score_next()
        finally:
            self._ended = True
            self._model.shutdown(wait=True)
            self._decoder.shutdown(wait=True)
            for work in self._scheduler.works:
                _fail(work.body, RequestError(503, "the server has ended"))

    def begin_drain(self) -> None:
        """Not ready from now on. Bodies are still taken: those who send them learn of it later."""
        self._draining = True

    def close(self) -> None:
        """No body is taken from now on; those that were taken are answered."""
        self._draining = self._closed = True

    async def drained(self) -> None:
        """Return once every body that was taken is answered."""
        await self._idle.wait()

    async def in_thread(self, work: Callable[..., Result], *given: Any) -> Result:
        """The result of work that may take long, done in the thread that decodes bodies."""
        return await asyncio.get_running_loop().run_in_executor(self._decoder, work, *given)

    async def score(self, call: Call) -> Reply:
        """The answer to a body.

        Raises:
            RequestError: 504 once its deadline has passed; 429, 503 where the server cannot take it now; 4xx
                for whatever cannot be scored.
        """
        arrived = self.clock()
        async with self._in_time(self._deadline(call.deadline, arrived)) as deadline:
            scorer, histories, limits = self.versions.scorer, self.versions.histories, self.settings.limits
            given = (call.content, call.content_type, scorer, histories, limits)
            body = await self.in_thread(decode, *given)
            self.observe.decoded(self.clock() - arrived)
            answers = await self._answers(body, deadline, call.hold)
            content = encode(answers, body, call.as_arrow)
            if call.hold is not None:
                call.hold(len(content))
        unknown = sum(sum(answer.unknown.values()) for answer in answers)
        self.observe.answered(self.clock() - arrived, unknown)
        return Reply(content, arrow_body.MEDIA_TYPE if call.as_arrow else JSON, scorer.version)

    async def answers(
        self, body: Body, deadline: float | None = None, hold: Callable[[int], None] | None = None
    ) -> list[Answer]:
        """One answer a request, for adapters that decode and encode themselves.

        Args:
            deadline, hold: see `Call`.

        Raises:
            RequestError: 504 once the deadline has passed; 413, 429, 503 where the server cannot take it.
        """
        arrived = self.clock()
        async with self._in_time(self._deadline(deadline, arrived)) as until:
            answers = await self._answers(body, until, hold)
        unknown = sum(sum(answer.unknown.values()) for answer in answers)
        self.observe.answered(self.clock() - arrived, unknown)
        return answers

    def _deadline(self, asked: float | None, now: float) -> float:
        if asked is not None:
            return asked
        seconds = self.settings.batching.deadline
        return now + seconds if seconds else math.inf

    @asynccontextmanager
    async def _in_time(self, deadline: float) -> AsyncIterator[float]:
        """Takes a body: ends what is inside with 504 at the deadline, and counts who leaves before.

        Raises:
            RequestError: 429, 503 where no body is taken now.
        """
        self._check_room()
        self._taken += 1
        self._idle.clear()
        left = None if math.isinf(deadline) else max(deadline - self.clock(), 0.0)
        limit = asyncio.timeout(left)
        try:
            async with limit:
                yield deadline
        except TimeoutError:
            if not limit.expired():
                raise
            self.observe.lost("expired")
            raise RequestError(504, "not scored before its deadline") from None
        except asyncio.CancelledError:
            self.observe.lost("abandoned")
            raise
        finally:
            self._taken -= 1
            if not self._taken:
                self._idle.set()

    def _check_room(self) -> None:
        """Raises RequestError where no body is taken now."""
        if self._closed:
            self.observe.lost("draining")
            raise RequestError(503, "the server is about to end", 1)
        most = self.settings.batching.waiting
        if self._taken >= most:
            self.observe.lost("full")
            raise RequestError(429, f"{most} requests are waiting; try again", 1)

    async def _answers(self, body: Body, deadline: float, hold: Callable[[int], None] | None) -> list[Answer]:
        """Queue it and wait."""
        if hold is not None:
            hold(sum(request.bytes for request in body.requests))
        work = self._work(body, deadline)
        self._check_hope(work)
        waiting: _Waiting = work.body
        self._scheduler.settings = self.settings.batching
        self._scheduler.add(work)
        self._arrived.set()
        try:
            return await waiting.answer
        finally:
            self._scheduler.remove(work)

    def _work(self, body: Body, deadline: float) -> Work:
        needs, limit = body.scorer.needs, self.settings.limits.cost
        sizes = [
            Size(1, int(request.history.time.size), request.count, cost_of(request, needs))
            for request in body.requests
        ]
        cost = sum(size.cost for size in sizes)
        if cost > limit:
            pairs = f"candidates x (behaviors that the model reads + {PAIRS_OF_CANDIDATE})"
            problem = f"the body costs {cost:,} pairs ({pairs}), the server takes {limit:,} (limits.cost)"
            raise RequestError(413, f"{problem}; send fewer requests at once")
        waiting = _Waiting(body, asyncio.get_running_loop().create_future())
        kind = (id(body.scorer), body.explain)
        return Work(waiting, kind, sizes, self.settings.batching, self.clock(), deadline)

    def _check_hope(self, work: Work) -> None:
        """Raises RequestError (503) for a body that would be scored too late."""
        now = self.clock()
        seconds = self._pace.seconds(self._scheduler.cost_before(work), now)
        if seconds is None or now + seconds <= work.deadline:
            return
        self.observe.lost("hopeless")
        left = max(work.deadline - now, 0.0)
        problem = f"it would take about {seconds:.1f} s until this is scored, and it has {left:.1f} s"
        raise RequestError(503, f"{problem}; try again", min(max(math.ceil(seconds - left), 1), 60))

    async def _company(self) -> None:
        """Wait for a body, and as long as the settings say for others to share its model call."""
        while (first := self._scheduler.first) is None:
            self._arrived.clear()
            await self._arrived.wait()
        window = first.queued + self.settings.batching.window - self.clock()
        if window > 0:
            await asyncio.sleep(window)

    async def _score_next(self) -> None:
        now = self.clock()
        works = self._scheduler.begin(now)
        if not works:
            return
        parts = [work.part for work in works]
        bodies: list[_Waiting] = [work.body for work in works]
        waited = [now - work.queued for work in works if not work.done]
        given = [_scored(waiting.body, part) for waiting, part in zip(bodies, parts, strict=True)]
        outcomes: Sequence[list[Answer] | Exception]
        try:
            scoring = asyncio.get_running_loop().run_in_executor(self._model, score_parts, given)
            outcomes, seconds = await scoring
            ended = self.clock()
            self._pace.note(sum(part.size.cost for part in parts), ended - now, ended)
            requests = sum(part.size.requests for part in parts)
            candidates = sum(part.size.candidates for part in parts)
            self.observe.called(ModelCall(len(works), requests, candidates, waited, seconds))
        except Exception as error:
            outcomes = [error] * len(works)
        for work, waiting, outcome in zip(works, bodies, outcomes, strict=True):
            if isinstance(outcome, Exception):
                self._scheduler.remove(work)
                _fail(waiting, outcome)
                continue
            waiting.answers += outcome
            if work.is_last and not waiting.answer.done():
                waiting.answer.set_result(waiting.answers)
        self._scheduler.end()


def _scored(body: Body, part: BodyPart) -> Scored:
    return Scored(body.scorer, body.requests[part.first : part.end], body.explain, body.exploration)


def _fail(waiting: _Waiting, error: Exception) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)
