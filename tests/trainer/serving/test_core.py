"""The scoring core around a scorer that waits for the test: turns, deadlines, clients that leave, the end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from tests.helpers.held_scorer import Held, HeldScorer, held_core, request
from trainer.serving.call import Call
from trainer.serving.cost import PAIRS_OF_CANDIDATE
from trainer.serving.request import Limits, RequestError
from trainer.serving.scorer import Answer


def scores(answers: list[Answer]) -> list[float]:
    return [answer.probabilities[0, 0] for answer in answers]


def during(test: Callable[[Held], Awaitable[None]], limits: Limits | None = None, **batching: int) -> None:
    """Run a test while its core runs."""

    async def run() -> None:
        async with held_core(limits, **batching) as held:
            await test(held)

    asyncio.run(run())


async def status_of(asked: Awaitable[object]) -> int:
    with pytest.raises(RequestError) as caught:
        await asked
    return caught.value.status


def test_a_small_body_waits_for_one_part_of_a_large_one() -> None:
    """It comes while the first part of 64 requests is scored; each part is one of 5,000 candidates."""

    async def test(held: Held) -> None:
        large = held.ask(*(request(user, candidates=5_000) for user in range(64)))
        await held.until_calls(1)
        small = held.ask(request(100))
        await asyncio.sleep(0)
        held.scorer.let_go(2)
        assert scores(await small) == [100]
        await held.until_calls(3)
        assert held.scorer.calls == [[0], [100], [1]] and not large.done()
        held.scorer.open()
        assert scores(await large) == list(range(64))
        assert held.scorer.calls[2:] == [[user] for user in range(1, 64)]
        assert [len(call.waited) for call in held.noted.ended] == [1, 1] + [0] * 63

    during(test, candidates=5_000)


def test_large_bodies_take_turns_and_small_ones_share_a_call() -> None:
    async def test(held: Held) -> None:
        one = held.ask(*(request(user) for user in range(6)))
        await held.until_calls(1)
        other = held.ask(*(request(user) for user in range(10, 16)))
        some = [held.ask(request(user)) for user in (20, 30, 40)]
        await asyncio.sleep(0)
        held.scorer.open()
        await asyncio.gather(one, other, *some)
        assert held.scorer.calls == [[0, 1], [10, 11], [20, 30], [40], [2, 3], [12, 13], [4, 5], [14, 15]]

    during(test, requests=2)


def test_bodies_of_other_versions_or_with_reasons_are_scored_apart() -> None:
    async def test(held: Held) -> None:
        first = held.ask(request(0))
        await held.until_calls(1)
        old = held.ask(request(1))
        held.core.versions.scorer = HeldScorer("v00000002")
        held.core.versions.scorer.open()
        plain, body = held.ask(request(2)), held.body(request(3))
        explained = asyncio.create_task(held.core.answers(replace(body, explain=True)))
        await asyncio.sleep(0)
        held.scorer.open()
        await asyncio.gather(first, old, plain, explained)
        assert held.scorer.calls == [[0], [1]] and held.core.versions.scorer.calls == [[2], [3]]

    during(test)


def test_work_that_clients_leave_behind_is_not_scored() -> None:
    """Whoever leaves while their first part is scored, or before, has none of the others scored."""

    async def test(held: Held) -> None:
        left = [held.ask(*(request(user + n) for n in range(3))) for user in (0, 10)]
        await held.until_calls(1)
        for each in left:
            each.cancel()
        await asyncio.wait(left)
        last = held.ask(request(99))
        held.scorer.open()
        assert scores(await last) == [99]
        assert held.scorer.calls == [[0], [99]]
        assert held.noted.losses == ["abandoned", "abandoned"]

    during(test, requests=1)


def test_work_whose_deadline_passes_is_not_scored() -> None:
    """It is answered 504 at its deadline, not at its turn; a deadline that has passed is none to wait for."""

    async def test(held: Held) -> None:
        first = held.ask(request(0))
        await held.until_calls(1)
        soon, gone = time.monotonic() + 0.02, time.monotonic() - 1.0
        late = [held.ask(request(n), request(n + 1), deadline=soon) for n in (10, 20)]
        late.append(held.ask(request(30), deadline=gone))
        for each in late:
            assert await status_of(each) == 504
        assert not first.done() and held.noted.losses == ["expired"] * 3
        held.scorer.open()
        await first
        assert scores(await held.ask(request(1))) == [1] and held.scorer.calls == [[0], [1]]

    during(test)


def test_a_body_has_the_time_that_the_settings_say() -> None:
    async def test(held: Held) -> None:
        assert await status_of(held.ask(request(0), request(1))) == 504
        held.core.settings = replace(
            held.core.settings, batching=replace(held.core.settings.batching, deadline=0)
        )
        held.scorer.open()
        assert scores(await held.ask(request(2))) == [2]
        assert held.scorer.calls == [[0], [2]]

    during(test, deadline=0.02, requests=1)


def test_a_body_that_has_expired_while_another_was_scored_is_dropped_before_its_turn() -> None:
    """The event loop may be late itself: the scheduler looks at the clock too."""

    async def test(held: Held) -> None:
        first = held.ask(request(0))
        await held.until_calls(1)
        late = held.ask(request(1), deadline=time.monotonic() + 1_000)
        await asyncio.sleep(0)
        held.core.clock = lambda: time.monotonic() + 2_000
        held.scorer.open()
        await first
        assert scores(await held.ask(request(2), deadline=time.monotonic() + 9_000)) == [2]
        assert held.scorer.calls == [[0], [2]]
        late.cancel()

    during(test)


def test_hopeless_work_is_refused_once_a_pace_is_known() -> None:
    """With the time after which it may come again; without a measurement nothing is refused."""

    async def test(held: Held) -> None:
        now = 1_000.0
        held.core.clock = lambda: now
        body = held.ask(*(request(user, 5_000) for user in range(2)), deadline=now + 5)
        await held.until_calls(1)
        now += 10
        held.scorer.let_go()
        await held.until_calls(2)
        held.scorer.open()
        await asyncio.wait([body])
        # Two such parts take 20 seconds.
        large = [request(user, 5_000) for user in (10, 11)]
        with pytest.raises(
            RequestError, match="20.[0-9] s until this is scored, and it has 12.0 s"
        ) as caught:
            await held.ask(*large, deadline=now + 12)
        assert caught.value.status == 503 and caught.value.retry_after == 9
        assert held.noted.losses[-1] == "hopeless"
        assert scores(await held.ask(*large, deadline=now + 30)) == [10, 11]
        # An old measurement says nothing.
        now += 100
        assert scores(await held.ask(request(12, 5_000), deadline=now + 1)) == [12]

    during(test, candidates=5_000)
