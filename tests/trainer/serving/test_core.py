"""The scoring core around a scorer that waits for the test: turns, deadlines, clients that leave, the end."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.held_scorer import Held, HeldScorer, held_core, request
from trainer.serving import model_calls
from trainer.serving.call import Call
from trainer.serving.core import State
from trainer.serving.cost import PAIRS_OF_CANDIDATE, work_of
from trainer.serving.observer import Observer
from trainer.serving.pace import Pace
from trainer.serving.request import Limits, RequestError
from trainer.serving.scheduler import BatchSettings
from trainer.serving.scorer import Answer, Seconds
from trainer.serving.soundness import UnsoundError


def scores(answers: list[Answer]) -> list[float]:
    return [answer.probabilities[0, 0] for answer in answers]


def during(test: Callable[[Held], Awaitable[None]], limits: Limits | None = None, **batching: float) -> None:
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
        # What stands behind the part under way waits, too.
        waiting = held.core.queue
        assert waiting.bodies == 1 and waiting.parts == 62
        assert waiting.cost == 62 * 5_000 * (1 + PAIRS_OF_CANDIDATE)
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


def test_short_calls_are_made_by_the_event_loop_but_for_the_first_of_a_version() -> None:
    def noting(scorer: HeldScorer, threads: list[bool]) -> HeldScorer:
        plain = scorer.score

        def score(*given: Any) -> tuple[list[Answer], Seconds]:
            threads.append(threading.current_thread() is threading.main_thread())
            return plain(*given)

        scorer.open()
        scorer.score = score  # type: ignore[method-assign]
        return scorer

    async def test(held: Held) -> None:
        by_loop: list[bool] = []
        noting(held.scorer, by_loop)
        for user in range(3):
            assert scores(await held.ask(request(user))) == [user]
        several = [held.ask(request(user)) for user in range(40)]
        assert [scores(await each) for each in several] == [[user] for user in range(40)]
        assert by_loop == [False, True, True, True, True]
        held.core.versions.scorer = noting(HeldScorer("v00000002"), by_loop)
        assert scores(await held.ask(request(7))) == [7]
        # Who may have to wait for other processes does so in a thread.
        held.core.versions.scorer.states = SimpleNamespace(store=object())  # type: ignore[assignment]
        assert scores(await held.ask(request(8))) == [8]
        held.core.settings = replace(held.core.settings, batching=BatchSettings(at_once=0.0))
        held.core.versions.scorer.states = None
        assert scores(await held.ask(request(9))) == [9]
        assert by_loop[5:] == [False, False, False]
        assert [len(call.waited) for call in held.noted.ended] == [1, 1, 1, 32, 8, 1, 1, 1]

    during(test, at_once=60.0)


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
        assert held.scorer.calls[-1] == [2] and [1] not in held.scorer.calls

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
        # Whatever has no measurement is taken.
        body = held.ask(request(0, 5_000), deadline=now + 20)
        await held.until_calls(1)
        now += 10
        held.scorer.open()
        await body
        # Two such parts take 20 seconds, and after the next measurement 10.
        large = [request(user, 5_000) for user in (10, 11)]
        # Now and then one that would take too long is scored all the same; here it takes no time.
        assert scores(await held.ask(request(1, 5_000), deadline=now + 5)) == [1]
        alone = r"body alone takes about 10\.0 s, and it has 6\.0 s; send fewer candidates or allow more time"
        with pytest.raises(RequestError, match=alone) as caught:
            await held.ask(*large, deadline=now + 6)
        assert caught.value.status == 503 and caught.value.retry_after is None
        assert held.noted.losses[-1] == "hopeless"
        assert scores(await held.ask(*large, deadline=now + 30)) == [10, 11]
        # An old measurement says nothing, and where the model has no work it soon is old.
        now += 1.5
        assert scores(await held.ask(request(12, 5_000), deadline=now + 1)) == [12]

    during(test, candidates=5_000)


def test_a_call_that_took_long_by_accident_is_soon_forgotten() -> None:
    """A machine that stood still says little of the calls behind it, also where few and short ones follow."""
    pace, now = Pace(), 0.0
    pace.note(1_000_000, 4.0, now)
    assert pace.seconds(1_000_000, now, busy=True) == 4.0
    for _ in range(50):
        now += 0.2
        pace.note(1_000_000, 0.01, now)
    assert 0.01 < pace.seconds(1_000_000, now, busy=True) < 0.05


def test_small_calls_alone_tell_about_how_long_a_large_body_takes() -> None:
    """Of a model whose calls take 2.2 ms each, and 0.8 ns a pair."""
    pace, pair, fixed = Pace(), 0.8e-9, 2.2e-3
    small, large, parts = 10 * 2_700, 64 * 5_000 * 2_700, 54
    for call in range(50):
        pace.note(work_of(1, 1, small), fixed + small * pair, call * 0.01)
    expected = parts * fixed + large * pair
    assert 0.7 * expected < pace.seconds(work_of(parts, 64, large), 0.5) < 1.4 * expected


def test_a_failing_part_fails_its_own_body_alone() -> None:
    """Its company is scored again without it, and the rest of a body that failed is not scored."""

    async def test(held: Held) -> None:
        held.scorer.wrong = {11}
        first = held.ask(request(0))
        await held.until_calls(1)
        wrong = held.ask(*(request(user) for user in (10, 11)))
        fine = held.ask(request(20))
        longer = held.ask(*(request(user) for user in range(11, 17)))
        await asyncio.sleep(0)
        held.scorer.open()
        with pytest.raises(ValueError, match="a wrong request"):
            await wrong
        assert scores(await fine) == [20]
        with pytest.raises(ValueError, match="a wrong request"):
            await longer
        assert scores(await held.ask(request(30))) == [30]
        await first
        assert held.scorer.calls == [[0], [10, 11, 20], [10, 11], [20], [11, 12, 13], [30]]

    during(test, requests=3)


def test_what_breaks_in_the_observer_is_told_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(held: Held) -> None:
        held.scorer.open()
        with monkeypatch.context() as patched:
            patched.delattr(type(held.noted), "called")
            patched.delattr(Observer, "called")
            with pytest.raises(AttributeError):
                await held.ask(request(0))
        assert scores(await held.ask(request(1))) == [1] and held.core.state.live

    during(test)


def test_a_body_that_costs_too_much_is_refused() -> None:
    async def test(held: Held) -> None:
        held.scorer.open()
        await held.ask(request(0, candidates=3, behaviors=100))
        with pytest.raises(RequestError) as caught:
            await held.ask(*[request(0, candidates=3, behaviors=100)] * 2)
        assert caught.value.status == 413
        assert str(caught.value) == (
            "the body costs 15,600 pairs (candidates x (behaviors that the model reads + 2,500)), the server "
            "takes 7,800 (limits.cost); send fewer requests at once"
        )

    during(test, Limits(cost=3 * (100 + PAIRS_OF_CANDIDATE)))


def test_too_many_bodies_are_turned_away_and_those_left_behind_make_room() -> None:
    async def test(held: Held) -> None:
        asked = [held.ask(request(user)) for user in range(3)]
        await held.until_calls(1)
        assert await status_of(asked[2]) == 429
        asked[1].cancel()
        await asyncio.wait([asked[1]])
        another = held.ask(request(9))
        held.scorer.open()
        assert scores(await another) == [9] and scores(await asked[0]) == [0]
        assert held.noted.losses == ["full", "abandoned"]

    during(test, waiting=2)


def test_a_core_that_drains_is_not_ready_and_finishes_what_comes() -> None:
    """Those who send bodies learn late that they should no longer."""

    async def test(held: Held) -> None:
        assert held.core.state == State(live=True, ready=True, draining=False, problems=())
        long = held.ask(*(request(user) for user in range(5)))
        await held.until_calls(1)
        held.core.begin_drain()
        state = held.core.state
        assert state.live and not state.ready and state.draining and len(state.problems) == 1
        late = held.ask(request(9))
        held.scorer.open()
        assert scores(await long) == list(range(5)) and scores(await late) == [9]

    during(test, requests=1)


def test_the_end_of_the_core_is_told_to_whoever_waits() -> None:
    async def run() -> None:
        async with held_core(requests=1) as held:
            asked = [held.ask(request(user)) for user in range(3)]
            await held.until_calls(1)
        assert [await status_of(each) for each in asked] == [503] * 3
        assert not held.core.state.live and not held.core.state.ready
        assert held.scorer.calls == [[0]]

    asyncio.run(run())


def content(*users: int, candidates: int = 1) -> memoryview:
    history = {"timestamp": [1], "features": {"item_id": [1]}}
    asked = [{"user_id": u, "history": history, "candidates": {"item_id": [1] * candidates}} for u in users]
    return memoryview(json.dumps({"requests": asked}).encode())


@pytest.mark.parametrize("inline", [0, 1 << 20])
def test_bodies_are_decoded_scored_and_encoded(inline: int) -> None:
    """Long ones by another thread; what is held for them is told before they are scored and after."""

    async def test(held: Held) -> None:
        told: list[int] = []
        held.scorer.open()
        reply = await held.core.score(Call(content(1, 2, candidates=1_500), hold=told.append))
        assert (reply.media_type, reply.version) == ("application/json", "v00000001")
        results = json.loads(reply.content)["results"]
        assert [result["scores"]["click"] for result in results] == [[1.0] * 1_500, [2.0] * 1_500]
        # Ids of candidates; of behaviors an id and a time; the probabilities.
        assert told == [2 * (1_500 * 8 + 16 + 1_500 * 4), len(reply.content)]

    during(test, inline=inline)


@pytest.mark.parametrize("inline", [0, 1 << 20])
def test_the_bytes_of_a_body_are_let_go_of_before_it_waits(inline: int) -> None:
    class Bytes(bytearray):
        """Unlike its base, something that a weak reference may name."""

    async def test(held: Held) -> None:
        given = Bytes(content(1))
        there = weakref.ref(given)
        asked = asyncio.create_task(held.core.score(Call(memoryview(given))))
        del given
        await held.until_calls(1)
        assert there() is None
        held.scorer.open()
        await asked

    during(test, inline=inline)


def test_a_body_that_does_not_fit_into_memory_is_not_scored() -> None:
    async def test(held: Held) -> None:
        def refuse(size: int) -> None:
            raise RequestError(503, f"{size} bytes are too many")

        assert await status_of(held.core.score(Call(content(1), hold=refuse))) == 503
        assert not held.scorer.calls

    during(test)


def test_answers_that_are_no_numbers_are_refused_and_the_core_is_not_ready() -> None:
    """Other bodies of the call get their answers, and another version makes it ready again."""

    async def test(held: Held) -> None:
        first = held.ask(request(0))
        await held.until_calls(1)
        held.scorer.odd = {2}
        odd, fine = held.ask(request(1), request(2)), held.ask(request(3))
        await asyncio.sleep(0)
        held.scorer.open()
        with pytest.raises(UnsoundError, match="v00000001 answers with what is no number: a table"):
            await odd
        assert scores(await fine) == [3] and scores(await first) == [0]
        state = held.core.state
        assert state.live and not state.ready and "is no number: a table" in state.problems[0]
        assert await status_of(held.ask(request(2))) == 503
        assert held.noted.unsounds == [("v00000001", "a table")]
        assert held.noted.losses == ["unsound", "unsound"]
        held.core.versions.scorer = HeldScorer("v00000002")
        assert held.core.state.ready

    def told(scorer: object, asked: object, known: bool) -> UnsoundError:
        return UnsoundError("v00000001", "a table")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model_calls, "error_of", told)
        during(test)
