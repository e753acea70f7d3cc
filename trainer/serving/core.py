"""Scoring as a service, without a protocol: bodies come in, answers go out, and the model is never idle.

Adapters for HTTP, gRPC and others know this class alone. Whoever awaits an answer and is cancelled, because a
client left, takes the body out of the queue.
"""

from __future__ import annotations

import asyncio
import math
import time
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from trainer.serving import arrow_body
from trainer.serving.body import Body, decode, encode, held_bytes
from trainer.serving.call import JSON, Call, Reply
from trainer.serving.caller import Begun, Caller, Ended
from trainer.serving.cost import sizes_of, work_of
from trainer.serving.model_calls import Outcome, Portion
from trainer.serving.observer import Follow, ModelCall, Observer, PartTimes
from trainer.serving.request import Limits, RequestError
from trainer.serving.scheduler import BatchSettings, BodyPart, Scheduler, Work
from trainer.serving.scorer import Answer, Scorer
from trainer.serving.soundness import UnsoundError
from trainer.serving.versions import Versions

Result = TypeVar("Result")
# The answer to more candidates is written by a thread, so that others do not wait for it.
_FEW_CANDIDATES = 2_000
# Seconds after which a client that was sent away may come again, at the latest.
_LATEST_RETRY = 60
# So often a body is scored that by the pace would take too long even alone: the pace may be wrong for it.
_SECONDS_OF_TRIAL = 30.0


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
    follow: Follow | None = None
    answers: list[Answer] = field(default_factory=list)

    def fail(self, error: Exception) -> None:
        """Tell whoever waits; nobody does where a client left."""
        if not self.answer.done():
            self.answer.set_exception(error)


_Job = Work[_Waiting]


@dataclass(frozen=True)
class _Call:
    """A model call that is under way, the bodies and their parts."""

    jobs: Sequence[_Job]
    parts: Sequence[BodyPart]
    begun: Begun


class Queue(NamedTuple):
    """Bodies that were taken and are not answered; of those that wait for the model, parts and their cost."""

    bodies: int
    parts: int
    cost: int


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
        self._scheduler: Scheduler[_Waiting] = Scheduler(self.settings.batching)
        self._tried = -math.inf
        self._arrived = asyncio.Event()
        self._ended = self._draining = False
        # The scorer whose answers were found to be no numbers.
        self._unsound: Callable[[], Scorer | None] = lambda: None
        self._unsound_problem = ""
        # Bodies that are decoded, wait, are scored or encoded.
        self._taken = 0
        self._caller = Caller(self.settings.batching.threads)
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
        if self._unsound() is self.versions.scorer:
            problems.append(self._unsound_problem)
        return State(not self._ended, not problems, self._draining, tuple(problems))

    @property
    def queue(self) -> Queue:
        """What waits now."""
        return Queue(self._taken, *self._scheduler.left())

    async def run(self) -> None:
        """Score what comes, until cancelled; whatever goes wrong, its bodies are told and others go on."""
        try:
            while True:
                await self._company()
                call = self._begin()
                while call is not None:
                    outcomes = await self._outcomes(call)
                    # The model goes on with the next call while the answers of this one are handed out. The
                    # event loop, where that scored, first sends them and reads what has come meanwhile.
                    following = None if call.begun.scoring is None else self._begin()
                    self._hand_out(call, outcomes)
                    call = following
        finally:
            self._ended = True
            self._caller.close()
            self._decoder.shutdown(wait=True)
            for job in (*self._scheduler.under_way, *self._scheduler.waiting):
                job.owner.fail(RequestError(503, "the server has ended"))

    def begin_drain(self) -> None:
        """Not ready from now on. Bodies are still taken: those who send them learn of it later."""
        self._draining = True

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
            as_arrow, hold = call.as_arrow, call.hold
            body = await self._decoded(call)
            # What came is let go of: a body may wait for long.
            del call
            self.observe.decoded(self.clock() - arrived)
            answers = await self._answers(body, deadline, hold)
            content = await self._encoded(answers, body, as_arrow)
            if hold is not None:
                hold(len(content))
        self._note_answered(arrived, answers)
        return Reply(content, arrow_body.MEDIA_TYPE if as_arrow else JSON, body.scorer.version)

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
        self._note_answered(arrived, answers)
        return answers

    def _note_answered(self, arrived: float, answers: Sequence[Answer]) -> None:
        unknown = sum(sum(answer.unknown.values()) for answer in answers)
        self.observe.answered(self.clock() - arrived, unknown)

    async def _decoded(self, call: Call) -> Body:
        scorer, histories, settings = self.versions.scorer, self.versions.histories, self.settings
        given = (call.content, call.content_type, scorer, histories, settings.limits)
        # A stored history may have to be read from a disk.
        if len(call.content) <= settings.batching.inline and histories is None:
            return decode(*given)
        return await self.in_thread(decode, *given)

    async def _encoded(self, answers: Sequence[Answer], body: Body, as_arrow: bool) -> bytes:
        if sum(request.count for request in body.requests) <= _FEW_CANDIDATES:
            return encode(answers, body, as_arrow)
        return await self.in_thread(encode, answers, body, as_arrow)

    def _deadline(self, asked: float | None, now: float) -> float:
        if asked is not None:
            return asked
        seconds = self.settings.batching.deadline
        return now + seconds if seconds else math.inf

    @asynccontextmanager
    async def _in_time(self, deadline: float) -> AsyncIterator[float]:
        """Takes a body: ends what is inside with 504 at the deadline, and counts who leaves before.

        Raises:
            RequestError: 429 where too many wait, 504.
        """
        self._check_room()
        if deadline <= self.clock():
            self.observe.lost("expired")
            raise RequestError(504, "its deadline had passed when it came")
        self._taken += 1
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

    def _check_room(self) -> None:
        """Raises RequestError (429) where too many bodies wait."""
        most = self.settings.batching.waiting
        if self._taken >= most:
            self.observe.lost("full")
            raise RequestError(429, f"{most} requests are waiting; try again", 1)

    async def _answers(self, body: Body, deadline: float, hold: Callable[[int], None] | None) -> list[Answer]:
        """Queue it and wait."""
        if hold is not None:
            hold(held_bytes(body))
        job = self._job(body, deadline)
        self._check_hope(job)
        self._scheduler.settings = self.settings.batching
        self._scheduler.add(job)
        self._arrived.set()
        try:
            return await job.owner.answer
        finally:
            # Where the client left or the time is over, nothing more of it is scored.
            self._scheduler.remove(job)

    def _job(self, body: Body, deadline: float) -> _Job:
        sizes = sizes_of(body.requests, body.scorer.needs, self.settings.limits)
        waiting = _Waiting(body, asyncio.get_running_loop().create_future(), self.observe.follow())
        kind = (id(body.scorer), body.explain)
        return Work(waiting, kind, sizes, self.settings.batching, self.clock(), deadline)

    def _check_hope(self, job: _Job) -> None:
        """Raises RequestError (503) for a body that would be scored too late."""
        now = self.clock()
        requests, cost = self._scheduler.before(job)
        calls = max(math.ceil(requests / self.settings.batching.requests), len(job.parts))
        busy = bool(self._scheduler.waiting or self._scheduler.under_way)
        seconds = self._caller.pace.seconds(work_of(calls, requests, cost), now, busy)
        if not seconds or now + seconds <= job.deadline:
            return
        left = max(job.deadline - now, 0.0)
        own = work_of(len(job.parts), job.requests(len(job.parts)), job.cost(len(job.parts)))
        alone = self._caller.pace.seconds(own, now, busy)
        if alone > left:
            if not busy and now - self._tried >= _SECONDS_OF_TRIAL:
                self._tried = now
                return
            self.observe.lost("hopeless")
            problem = f"this body alone takes about {alone:.1f} s, and it has {left:.1f} s"
            raise RequestError(503, f"{problem}; send fewer candidates or allow more time")
        self.observe.lost("hopeless")
        problem = f"it would take about {seconds:.1f} s until this is scored, and it has {left:.1f} s"
        later = min(max(math.ceil(seconds - left), 1), _LATEST_RETRY)
        raise RequestError(503, f"{problem}; try again", later)

    async def _company(self) -> None:
        """Wait for a body, and as long as the settings say for others to share its model call."""
        while not self._scheduler.waiting:
            self._arrived.clear()
            await self._arrived.wait()
        await asyncio.sleep(max(self._window(), 0.0))

    def _window(self) -> float:
        """How long the first body waits for company from now on; 0 or less: no longer."""
        first = self._scheduler.waiting[0]
        return first.queued + self.settings.batching.window - self.clock()

    def _begin(self) -> _Call | None:
        """The next model call, unless nobody waits, or who waits is to have company first."""
        now = self.clock()
        # Who awaits them is told by the clock of `_in_time`.
        self._scheduler.expire(now)
        if not self._scheduler.waiting or self._window() > 0:
            return None
        jobs = self._scheduler.begin()
        parts = [job.part for job in jobs]
        portions = [self._portion(job.owner.body, job.part) for job in jobs]
        work = work_of(1, sum(part.size.requests for part in parts), sum(part.size.cost for part in parts))
        return _Call(jobs, parts, self._caller.begin(portions, work, self.settings.batching.at_once, now))

    async def _outcomes(self, call: _Call) -> list[Outcome]:
        """Of each body of the call: answers to its part, or what went wrong with it."""
        try:
            ended = await self._caller.ended(call.begun, self.clock)
            outcomes = ended.outcomes
            self._note_called(call, ended)
        except Exception as error:
            outcomes = [error] * len(call.jobs)
        for job, outcome in zip(call.jobs, outcomes, strict=True):
            if isinstance(outcome, Exception):
                # None of its further parts is scored.
                self._scheduler.remove(job)
        self._scheduler.end()
        return outcomes

    def _note_called(self, call: _Call, ended: Ended) -> None:
        began, seconds = ended.began, ended.seconds
        taken = [part.size for part in call.parts]
        requests, candidates = sum(size.requests for size in taken), sum(size.candidates for size in taken)
        waited = [began - job.queued for job in call.jobs if not job.done]
        self.observe.called(ModelCall(len(call.jobs), requests, candidates, waited, seconds))
        for job in call.jobs:
            if job.owner.follow is not None:
                job.owner.follow(PartTimes(None if job.done else began - job.queued, seconds))

    def _hand_out(self, call: _Call, outcomes: Sequence[Outcome]) -> None:
        """Give each body what the call says, and those their answers that have all."""
        for job, outcome in zip(call.jobs, outcomes, strict=True):
            waiting = job.owner
            if isinstance(outcome, UnsoundError):
                self._note_unsound(waiting.body.scorer, outcome)
            if isinstance(outcome, Exception):
                waiting.fail(outcome)
                continue
            waiting.answers += outcome
            if len(waiting.answers) == len(waiting.body.requests) and not waiting.answer.done():
                waiting.answer.set_result(waiting.answers)

    def _portion(self, body: Body, part: BodyPart) -> Portion:
        requests = body.requests[part.first : part.end]
        unsound = body.scorer is self._unsound()
        return Portion(body.scorer, requests, body.explain, body.exploration, unsound)

    def _note_unsound(self, scorer: Scorer, error: UnsoundError) -> None:
        """Its answers are refused from now on wherever they are no numbers, and the core is not ready."""
        self.observe.lost("unsound")
        if self._unsound() is not scorer:
            self._unsound = weakref.ref(scorer)
            self._unsound_problem = str(error)
            self.versions.doubt(scorer)
            self.observe.unsound(scorer.version, error.where)
