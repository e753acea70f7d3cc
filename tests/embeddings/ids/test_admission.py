"""What the rules of admission promise: how many ids a sketch lets in too early, and chances."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.ids.admission.exact import ExactCounter
from embeddings.ids.admission.sketch import SketchCounter
from embeddings.ids.admission.table import ADMISSIONS
from embeddings.ids.hashing import hashed
from embeddings.ids.journal import Journal
from embeddings.ids.rules import IdRules
from tests.helpers.slow_ids import power_of

ALL = range(10)
RULES = IdRules(capacity=640, admission="count", counter="sketch", sketch_cells=10_000)


def admit(
    counter: ExactCounter | SketchCounter, ids: np.ndarray, journal: Journal | None = None
) -> np.ndarray:
    return counter.admit(ids, hashed(ids), np.ones_like(ids), 1, journal)


@pytest.mark.parametrize("enough", [2, 5])
def test_a_sketch_lets_few_ids_in_too_early(enough: int) -> None:
    """New ids up to the halving: by the bound at most 1/16 of those that come last are taken for old ones."""
    rules = IdRules(**{**RULES.__dict__, "admit_count": enough})
    counter, width = SketchCounter(rules, ALL), 1000
    once = np.arange(10 * width * (enough - 1) // 2 * 95 // 100)
    for piece in np.array_split(once, 50):
        admit(counter, piece)
    fresh = np.arange(10_000_000, 10_020_000)
    wrong = float(admit(counter, fresh).mean())
    assert (0.01 < wrong < 0.03) if enough == 2 else (wrong < 0.01)
    assert counter.state()["sums"].max() <= width * (enough - 1) // 2


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(0, 200), max_size=20), max_size=12), st.integers(2, 4))
def test_a_sketch_counts_no_id_too_few_times_until_it_is_halved(steps: list[list[int]], enough: int) -> None:
    counter = SketchCounter(IdRules(**{**RULES.__dict__, "admit_count": enough}), ALL)
    true = Counter[int]()
    for step in steps:
        true.update(step)
        ids, counts = np.unique(np.array(step, dtype=np.int64), return_counts=True)
        admitted = counter.admit(ids, hashed(ids), counts, 1, None)
        assert all(admitted[true_of(ids, true) >= enough])


def true_of(ids: np.ndarray, true: Counter[int]) -> np.ndarray:
    return np.array([true[int(each)] for each in ids], dtype=np.int64)


def test_a_full_sketch_forgets_by_halves() -> None:
    counter = SketchCounter(IdRules(**{**RULES.__dict__, "admit_count": 4}), ALL)
    ids = np.arange(100)
    for _ in range(3):
        assert not admit(counter, ids).any()
    before = {name: array.copy() for name, array in counter.state().items()}
    full = counter.state()["sums"].sum() + 18_000
    admit(counter, np.arange(1000, 19_000))
    assert abs(counter.state()["sums"].sum() - full / 2) < 100 and counter.state()["cells"].max() <= 2
    # Three sightings have become one.
    assert [bool(admit(counter, ids).all()) for _ in range(3)] == [False, False, True]
    counter.load(before)
    assert admit(counter, ids).all()


def test_a_halved_sketch_comes_back_to_the_bit() -> None:
    counter, journal = SketchCounter(RULES, ALL), Journal()
    admit(counter, np.arange(1000))
    before = {name: array.copy() for name, array in counter.state().items()}
    admit(counter, np.arange(500, 30_000), journal)
    after = {name: array.copy() for name, array in counter.state().items()}
    for expected in (before, after):
        journal.swap()
        assert all(np.array_equal(array, expected[name]) for name, array in counter.state().items())


def test_the_exact_counter_keeps_those_that_wait_in_one_order() -> None:
    """However ids come, also more at a time than are kept apart."""
    rules, rng = IdRules(capacity=640, admission="count", admit_count=3), np.random.default_rng(0)
    ids = rng.choice(10**9, 60_000, replace=False)
    twice, thrice, states = ids[::2], ids[::4], []
    for pieces in (1, 7):
        counter = ExactCounter(rules, ALL)
        for piece in np.array_split(rng.permutation(ids), pieces):
            assert not admit(counter, piece).any()
        assert not admit(counter, rng.permutation(twice)).any()
        assert admit(counter, rng.permutation(thrice)).all()
        states.append(counter.state())
    assert all(np.array_equal(array, states[1][name]) for name, array in states[0].items())
    assert states[0]["ids"].size == 45_000 and (np.diff(states[0]["ids"]) > 0).all()
    assert np.bincount(states[0]["counts"]).tolist() == [0, 30_000, 15_000]


@pytest.mark.parametrize("chance", [1e-4, 0.1, 0.5, 1.0])
def test_chances_of_several_sightings(chance: float) -> None:
    for count in (0, 1, 2, 3, 10, 1000):
        assert abs(power_of(chance, count) / 2**32 - (1 - chance) ** count) <= count / 2**30
    ids, counts = np.arange(40_000), np.repeat([0, 1, 3], [1000, 19_000, 20_000])
    rules = IdRules(capacity=640, admission="chance", admit_chance=chance)
    answers = [
        ADMISSIONS["chance"](rules, ALL).admit(ids, hashed(ids), counts, step, None) for step in (1, 2)
    ]
    assert not answers[0][:1000].any()
    for answer in answers:
        for some, n in ((slice(1000, 20_000), 1), (slice(20_000, None), 3)):
            expected = 1 - (1 - chance) ** n
            assert (
                abs(answer[some].mean() - expected) < 5 * (expected * (1 - expected) / 19_000) ** 0.5 + 1e-9
            )
    # Two steps draw anew.
    both = (answers[0] & answers[1])[1000:20_000].mean()
    assert abs(both - chance**2) < 0.02
