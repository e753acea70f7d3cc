"""Short model calls are made by the event loop's own thread, and others by the model's."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.helpers.held_scorer import HeldScorer, held_core, request
from trainer.serving.exploration import Exploration
from trainer.serving.model_calls import Portion
from trainer.serving.scorer import Scorer, Seconds
from trainer.serving.short_calls import Measured, ShortCalls


def asked(scorer: HeldScorer | None = None, **more: Any) -> Portion:
    return Portion(cast("Scorer", scorer or HeldScorer()), [request(1)], **more)


def noted(processor: float, reads: int = 0) -> ShortCalls:
    """With one call of 1,000 pairs measured, at 10 seconds."""
    calls = ShortCalls(torch.get_num_threads())
    calls.note(1_000, Measured([], Seconds(0.0, 0.0), processor, reads), 10.0)
    return calls


def test_what_calls_took_says_which_are_short() -> None:
    calls = noted(0.002)
    assert calls.allow([asked()], 2_000, 0.005, 10.5)
    assert not calls.allow([asked()], 3_000, 0.005, 10.5)
    assert not calls.allow([asked()], 1_000, 0.0, 10.5)
    # Nobody knows: nothing was measured, or long ago.
    assert not ShortCalls(torch.get_num_threads()).allow([asked()], 1, 0.005, 10.5)
    assert not calls.allow([asked()], 1_000, 0.005, 100.0)


def test_after_a_wait_for_a_disk_the_loop_makes_none_for_a_while() -> None:
    calls = noted(0.001, reads=1)
    assert not calls.allow([asked()], 1_000, 0.005, 10.5)
    assert calls.allow([asked()], 1_000, 0.005, 11.5)


def test_calls_that_may_wait_or_whose_work_is_not_known_go_to_the_thread() -> None:
    calls = noted(0.001)
    shared, own = (HeldScorer(states=SimpleNamespace(store=store)) for store in (object(), None))
    assert calls.allow([asked(own)], 1_000, 0.005, 10.5)
    assert not calls.allow([asked(shared)], 1_000, 0.005, 10.5)
    assert not calls.allow([asked(explain=True)], 1_000, 0.005, 10.5)
    exploring = replace(asked(), exploration=cast("Exploration", object()))
    assert not calls.allow([asked(), exploring], 1_000, 0.005, 10.5)


def test_other_numbers_of_threads_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = noted(0.001)
    monkeypatch.setattr(torch, "get_num_threads", lambda: -1)
    assert not calls.allow([asked()], 1_000, 0.005, 10.5)


def test_the_loop_scores_alone_and_goes_on_with_all_clients() -> None:
    """The first call is made by the thread, since nothing was measured; later ones by the loop."""

    async def test() -> list[str]:
        async with held_core(loop_seconds=60.0, threads=torch.get_num_threads(), requests=1) as held:
            held.scorer.open()
            held.scorer.wrong.add(7)
            await held.ask(request(0))
            answers = await asyncio.gather(
                *(held.ask(request(user)) for user in range(4, 9)), return_exceptions=True
            )
            left = held.ask(request(9))
            await asyncio.sleep(0)
            left.cancel()
            await held.ask(request(10))
            found = [str(a) if isinstance(a, BaseException) else a[0].probabilities[0, 0] for a in answers]
            assert found == [4, 5, 6, "a wrong request", 8]
            assert held.scorer.calls == [[0], [4], [5], [6], [7], [8], [10]]
            return held.scorer.threads

    first, *others = asyncio.run(test())
    assert first.startswith("score") and set(others) == {threading.current_thread().name}
