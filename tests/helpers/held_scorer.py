"""A scorer that a test lets go on call by call, and a scoring core around it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from trainer.log.bags import Bags
from trainer.serving.body import Body
from trainer.serving.core import CoreSettings, ScoringCore
from trainer.serving.observer import Loss, ModelCall, Observer
from trainer.serving.request import History, Limits, Needs, Part, Request
from trainer.serving.scheduler import BatchSettings
from trainer.serving.scorer import Answer, Scorer, Seconds

_ITEMS = ("item_id",)
NEEDS = Needs(
    Part("candidates", "candidates", "candidate_", _ITEMS, _ITEMS),
    Part("history", "history.features", "history_", _ITEMS, _ITEMS),
    Part("context", "context", "context_", (), ()),
    Part("numeric", "numeric", "numeric_", (), ()),
    {"item_id": 1_000_000},
    clusters=False,
    multi=frozenset(),
    length=100_000,
    delay=0,
    latest=1 << 33,
)


def request(user: int, candidates: int = 1, behaviors: int = 1) -> Request:
    """A request of a user, by which the calls of the scorer are told from each other."""
    ids = Bags(np.arange(candidates))
    history = History(np.arange(behaviors), {"item_id": Bags(np.arange(behaviors))})
    return Request(user, history, behaviors, {"item_id": ids}, candidates, {})


@dataclass
class HeldScorer:
    """Answers each request with its user's number, once the test lets the call go.

    Attributes:
        calls: the users of each call that has begun, in order; wrong: users whose requests raise an error;
            odd: users whose answers are no numbers.
    """

    version: str = "v00000001"
    calls: list[list[int]] = field(default_factory=list)
    wrong: set[int] = field(default_factory=set)
    odd: set[int] = field(default_factory=set)
    needs: Needs = NEEDS
    tasks: tuple[str, ...] = ("click",)
    encoders: dict[str, Any] = field(default_factory=dict)
    branches: dict[str, Any] = field(default_factory=dict)
    vocabularies: dict[str, Any] = field(default_factory=dict)
    states: Any = None
    snapshot: Any = field(default_factory=lambda: SimpleNamespace(id_maps={}, posteriors={}))

    def __post_init__(self) -> None:
        self._may, self._open = threading.Semaphore(0), threading.Event()

    def score(
        self, requests: Sequence[Request], explain: bool = False, explore: Sequence[Any] = ()
    ) -> tuple[list[Answer], Seconds]:
        self.calls.append([each.user_id for each in requests])
        if not self._open.is_set():
            self._may.acquire()
        if self.wrong & {each.user_id for each in requests}:
            raise ValueError("a wrong request")
        return [self._answer(each) for each in requests], Seconds(0.0, 0.0)

    def _answer(self, given: Request) -> Answer:
        score = np.nan if given.user_id in self.odd else given.user_id
        return Answer(np.full((given.count, 1), score, dtype=np.float32), {}, unknown=given.unknown)

    def let_go(self, calls: int = 1) -> None:
        """So many calls may end."""
        self._may.release(calls)

    def open(self) -> None:
        """All calls may end from now on."""
        self._open.set()
        self._may.release(1_000)


class Noting(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.losses: list[Loss] = []
        self.ended: list[ModelCall] = []
        self.unsounds: list[tuple[str, str]] = []

    def called(self, call: ModelCall) -> None:
        self.ended.append(call)

    def lost(self, why: Loss) -> None:
        self.losses.append(why)

    def unsound(self, version: str, where: str) -> None:
        self.unsounds.append((version, where))


class Held:
    """A core with such a scorer."""

    def __init__(self, core: ScoringCore, scorer: HeldScorer, noted: Noting) -> None:
        self.core, self.scorer, self.noted = core, scorer, noted

    def body(self, *requests: Request) -> Body:
        return Body(cast("Scorer", self.core.versions.scorer), requests)

    def ask(self, *requests: Request, **more: Any) -> asyncio.Task[list[Answer]]:
        """A client that waits for its answers."""
        return asyncio.create_task(self.core.answers(self.body(*requests), **more))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what another thread brings about."""
        while not condition():
            await asyncio.sleep(0.001)

    async def until_calls(self, count: int) -> None:
        """Until so many model calls have begun."""
        await self.until(lambda: len(self.scorer.calls) >= count)


@asynccontextmanager
async def held_core(limits: Limits | None = None, **batching: Any) -> AsyncIterator[Held]:
    """A running core; what waits at the end is let go."""
    scorer, noted = HeldScorer(), Noting()
    versions = SimpleNamespace(scorer=scorer, histories=None, doubt=lambda scorer: None)
    # A call that is held must not be made by the event loop, which lets it go.
    settings = CoreSettings(limits or Limits(), BatchSettings(**{"at_once": 0.0, **batching}))
    core = ScoringCore(versions, settings, noted)  # type: ignore[arg-type]
    running = asyncio.create_task(core.run())
    try:
        async with asyncio.timeout(30):
            yield Held(core, scorer, noted)
    finally:
        scorer.open()
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
