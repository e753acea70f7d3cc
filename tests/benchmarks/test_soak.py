"""What a soak computes from what it saw: the slope of memory, and whether an answer is right."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from benchmarks.harness.http_client import HttpAnswer
from benchmarks.soak.accounts import Accounts
from benchmarks.soak.bodies import Body
from benchmarks.soak.memory import heap_in
from benchmarks.soak.slope import slope_of

BODY = Body(b"", "user 1", answers=1, candidates=2)


def answer(scores: list[float], version: str = "v1", status: int = 200) -> HttpAnswer:
    tree = {"version": version, "results": [{"scores": {"click": scores}}]}
    return HttpAnswer(status, json.dumps(tree).encode(), False)


def test_a_slope_is_that_of_the_blocks_after_the_warm_up() -> None:
    """Memory that jumps up and down within each block, as versions come and go, has no slope of its own."""
    seconds = np.arange(0, 3600, 5.0)
    noise = np.random.default_rng(0).normal(0, 1, seconds.size)
    saw = 50.0 * (seconds % 60 > 40)
    warming = np.where(seconds < 600, 1000.0, 0.0)
    found = slope_of(seconds, 300 + 12 * seconds / 3600 + saw + noise + warming, 60, 600)
    assert found.blocks == 50
    assert found.mb_per_hour == pytest.approx(12, abs=found.half) and 0 < found.half < 3
    flat = slope_of(seconds, 300 + saw + noise, 60, 0)
    assert abs(flat.mb_per_hour) < flat.half
    assert math.isnan(slope_of(seconds[:24], saw[:24], 60, 0).mb_per_hour)


def test_every_request_is_answered_rightly_turned_away_or_lost() -> None:
    accounts = Accounts(contents={"v1": 0, "v2": 1, "v3": 0})
    accounts.scored("steady", BODY, answer([0.25, 0.5]))
    accounts.scored("steady", BODY, answer([0.25, 0.5 + 1e-8], "v3"))
    accounts.scored("steady", BODY, answer([0.5, 0.5], "v2"))
    accounts.scored("steady", BODY, answer([], status=503))
    assert not accounts.lost and accounts.contents_differ()
    assert accounts.outcomes == {("steady", "answered"): 3, ("steady", "refused 503"): 1}
    for wrong, told in (
        (answer([0.5, 0.5], "v1"), "user 1: v1 scores otherwise by 0.25"),
        (answer([0.25]), "1 scores for 1 x 2 candidates"),
        (answer([0.25, math.nan]), "a score is no probability"),
        (answer([0.25, 0.5], "v9"), "version v9 was never published"),
        (answer([], status=500), "answered 500"),
    ):
        accounts.scored("steady", BODY, wrong)
        assert told in accounts.lost[-1]
    accounts.refused("mistaken", answer([0.1, 0.2]))
    accounts.refused("mistaken", answer([], status=422))
    assert accounts.count("lost") == len(accounts.lost) == 6


def test_contents_that_score_alike_show_nothing() -> None:
    accounts = Accounts(contents={"v1": 0, "v2": 1})
    for version in ("v1", "v2"):
        accounts.scored("steady", BODY, answer([0.25, 0.5], version))
    assert not accounts.contents_differ()


def test_the_heap_is_read_from_what_the_server_says() -> None:
    said = 'a 1\ntandemrec_heap_bytes{kind="used"} 1.5e+08\ntandemrec_heap_bytes{kind="free"} 2e+06\n'
    assert heap_in(said) == {"heap_used_mb": 150.0, "heap_free_mb": 2.0}
    assert heap_in("a 1\n") == {}
