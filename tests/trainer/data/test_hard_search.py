"""Hard and hierarchical hard search: equal to brute force, and what falling back through levels is for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.rivals.brute_force_search import hierarchical_search_reference
from trainer.data.hard_search import SearchResult, hierarchical_search

Inputs = dict[str, Any]
Ints = npt.NDArray[np.int64]


def random_block(
    seed: int, behaviors: int, candidates: int, requests: int, depth: int = 3, spread: int = 1, gap: int = 2
) -> Inputs:
    """A user block; ids are reused across parents, a level may be unknown above a known one, times tie."""
    rng = np.random.default_rng(seed)
    time = np.cumsum(rng.integers(0, gap + 1, behaviors))
    end = rng.integers(0, behaviors + 1, requests)
    newest = np.append(time, 0)[end - 1] if behaviors else np.zeros(requests, dtype=np.int64)
    return {
        "levels_history": rng.integers(0, 4, (depth, behaviors)) * spread,
        "time_history": time,
        "levels_candidate": rng.integers(0, 4, (depth, candidates)) * spread,
        "request_of_candidate": rng.integers(0, requests, candidates),
        "visible_start": rng.integers(0, behaviors + 1, requests) * rng.integers(0, 2, requests),
        "visible_end": end,
        "request_time": newest + rng.integers(0, 3, requests),
        "budget": int(rng.integers(1, 12)),
        "half_life": float(rng.uniform(0.5, 50)),
    }


def with_domains(block: Inputs, seed: int) -> Inputs:
    rng = np.random.default_rng(seed)
    first = int(rng.integers(0, block["budget"] + 1))
    second = int(rng.integers(0, block["budget"] - first + 1))
    domain = rng.choice([0, 1, 2], size=block["time_history"].size, p=[0.7, 0.2, 0.1])
    return block | {"domain_history": domain, "domain_minimum": {2: first, 1: second, 9: 0}}


def assert_equal(block: Inputs) -> SearchResult:
    found, wanted = hierarchical_search(**block), hierarchical_search_reference(**block)
    for name in ("index", "level", "matches"):
        assert getattr(found, name).dtype == getattr(wanted, name).dtype
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)
    assert found.decayed.dtype == np.float32
    np.testing.assert_allclose(found.decayed, wanted.decayed, rtol=1e-5, atol=1e-37)
    return found


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    behaviors=st.integers(0, 60),
    candidates=st.integers(0, 12),
    requests=st.integers(1, 5),
    depth=st.integers(1, 4),
    spread=st.sampled_from([1, 2**40]),  # small ids go through a table, large ones through a binary search
    gap=st.sampled_from([0, 1, 1000]),
    domains=st.booleans(),
)
@example(seed=0, behaviors=0, candidates=3, requests=2, depth=3, spread=1, gap=1, domains=True)
def test_equals_brute_force(seed: int, domains: bool, **size: int) -> None:
    block = random_block(seed, **size)
    assert_equal(with_domains(block, seed) if domains else block)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    raw=st.lists(st.integers(-(2**63), -1) | st.integers(1, 2**63 - 1), min_size=3, max_size=3, unique=True)
    | st.permutations([-1, -2, 3]),
)
def test_raw_ids_of_any_sign_match_as_dense_ones_do(seed: int, raw: list[int]) -> None:
    block = random_block(seed, behaviors=seed % 30, candidates=4, requests=2)
    ids = np.array([0, *raw])
    levels = {name: ids[block[name]] for name in ("levels_history", "levels_candidate")}
    dense, found = hierarchical_search(**block), hierarchical_search(**block | levels)
    for name in ("index", "level", "matches", "decayed"):
        np.testing.assert_array_equal(getattr(found, name), getattr(dense, name), err_msg=name)


@pytest.mark.parametrize("domains", [False, True])
def test_a_thousand_users(domains: bool) -> None:
    for seed in range(1000):
        block = random_block(seed, behaviors=seed % 97, candidates=4, requests=2)
        assert_equal(with_domains(block, seed) if domains else block)


def one_request(levels: list[list[int]], path: list[int], **more: Any) -> Inputs:
    """One candidate that sees the whole history; times are 10, 20, 30, ..."""
    behaviors = len(levels)
    return {
        "levels_history": np.array(levels, dtype=np.int64).reshape(behaviors, len(path)).T,
        "time_history": 10 * np.arange(1, behaviors + 1),
        "levels_candidate": np.array(path, dtype=np.int64)[:, None],
        "request_of_candidate": np.array([0]),
        "visible_start": np.array([0]),
        "visible_end": np.array([behaviors]),
        "request_time": np.array([10 * behaviors]),
        "budget": 4,
        "half_life": 10.0,
    } | more


def test_falls_back_through_the_levels_without_repeating() -> None:
    history = [[1, 2, 3], [1, 0, 0], [1, 2, 0], [1, 2, 3], [1, 5, 3], [2, 2, 3], [1, 0, 3], [0, 2, 3]]
    found = hierarchical_search(**one_request(history, [1, 2, 3], budget=7))
    assert found.index.tolist() == [[3, 0, 2, 6, 4, 1, -1]]
    assert found.level.tolist() == [[3, 3, 2, 1, 1, 1, 0]]
    assert found.matches.tolist() == [[6, 3, 2]]
    ages = {0: 7, 1: 6, 2: 5, 3: 4, 4: 3, 6: 1}  # in half-lives
    wanted = [[sum(2.0 ** -ages[i] for i in at) for at in ([0, 1, 2, 3, 4, 6], [0, 2, 3], [0, 3])]]
    np.testing.assert_allclose(found.decayed, wanted, rtol=1e-6)


def test_unknown_matches_nothing() -> None:
    found = hierarchical_search(**one_request([[0, 0], [1, 0], [0, 2]], [0, 2]))
    assert (found.index == -1).all() and not found.matches.any() and not found.decayed.any()
    found = hierarchical_search(**one_request([[0, 0], [1, 0], [1, 2]], [1, 0]))
    assert found.index.tolist() == [[2, 1, -1, -1]] and found.level.tolist() == [[1, 1, 0, 0]]


def test_ties_in_time_go_to_the_later_position() -> None:
    block = one_request([[1]] * 6, [1], time_history=np.full(6, 60))
    assert hierarchical_search(**block).index.tolist() == [[5, 4, 3, 2]]


def test_domain_minimum_keeps_the_rare_domain_in() -> None:
    history = [[1, 2], [1, 0], [1, 2], [1, 2], [1, 2], [1, 2], [1, 2]]
    block = one_request(history, [1, 2], domain_history=np.array([7, 7, 0, 0, 0, 0, 0]))
    assert hierarchical_search(**block).index.tolist() == [[6, 5, 4, 3]]
    block["domain_minimum"] = {7: 2}
    found = hierarchical_search(**block)
    assert found.index.tolist() == [[6, 5, 0, 1]] and found.level.tolist() == [[2, 2, 2, 1]]
    assert found.matches.tolist() == [[7, 6]]  # counts do not know of the budget


def test_only_the_visible_part_is_seen() -> None:
    block = random_block(5, behaviors=80, candidates=20, requests=4)
    before = hierarchical_search(**block)
    for candidate, request in enumerate(block["request_of_candidate"]):
        low, high = block["visible_start"][request], block["visible_end"][request]
        index = before.index[candidate][before.index[candidate] >= 0]
        assert ((index >= low) & (index < high)).all()
    last = int(block["visible_end"].max())
    noise = block["levels_history"].copy()
    noise[:, last:] = np.random.default_rng(0).integers(0, 4, noise[:, last:].shape)
    after = hierarchical_search(**block | {"levels_history": noise})
    np.testing.assert_array_equal(before.index, after.index)
    np.testing.assert_array_equal(before.decayed, after.decayed)


def test_hard_search_is_the_newest_of_the_category() -> None:
    block = random_block(3, behaviors=90, candidates=30, requests=3, depth=1)
    category, asked = block["levels_history"][0], block["levels_candidate"][0]
    found = hierarchical_search(**block)
    for candidate, request in enumerate(block["request_of_candidate"]):
        window = range(block["visible_start"][request], block["visible_end"][request])
        same = [i for i in window if category[i] == asked[candidate] > 0]
        wanted = same[::-1][: block["budget"]]
        assert found.index[candidate, : len(wanted)].tolist() == wanted
        assert (found.index[candidate, len(wanted) :] == -1).all()
        assert found.matches[candidate].tolist() == [len(same)]


def test_more_nodes_than_sixteen_bits_hold() -> None:
    many = 70_000
    item = np.random.default_rng(0).permutation(many) + 1
    block = one_request([[1]] * many, [1], levels_history=item[None], budget=2)
    block["levels_candidate"] = np.arange(1, many + 1)[None]
    block["request_of_candidate"] = np.zeros(many, dtype=np.int64)
    found = hierarchical_search(**block)
    np.testing.assert_array_equal(found.index[:, 0], np.argsort(item))
    assert (found.index[:, 1] == -1).all() and (found.matches == 1).all()


@pytest.mark.parametrize("lives", [1e-2, 1.0, 50.0, 5e3, 1e6], ids=lambda lives: f"{lives:g} half-lives")
@pytest.mark.parametrize("cut", [False, True])
def test_decayed_counts_against_the_direct_sum(lives: float, cut: bool) -> None:
    """From histories within a hundredth of a half-life to a million; `cut` starts windows near their end."""
    rng = np.random.default_rng(11)
    many, requests, year = 20_000, 12, 31_536_000
    end = np.sort(rng.integers(1, many + 1, requests))
    time = np.sort(rng.integers(0, year, many))
    block = {
        "levels_history": np.stack([rng.integers(0, 4, many), rng.integers(0, 9, many)]),
        "time_history": time,
        "levels_candidate": np.stack([rng.integers(1, 4, 60), rng.integers(1, 9, 60)]),
        "request_of_candidate": rng.integers(0, requests, 60),
        "visible_start": end - rng.integers(1, 60, requests) if cut else np.zeros(requests, dtype=np.int64),
        "visible_end": end,
        "request_time": time[end - 1] + 1,
        "budget": 20,
        "half_life": year / lives,
    }
    block["visible_start"] = np.maximum(block["visible_start"], 0)
    assert_equal(block)


def test_a_single_visible_event_behind_a_long_list() -> None:
    """The worst case for a difference of running sums: all weights alike, one event left of 100,000."""
    many = 100_000
    block = one_request([[1]] * many, [1], visible_start=np.array([many - 1]), half_life=1e12)
    np.testing.assert_allclose(hierarchical_search(**block).decayed, [[1.0]], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0}, "budget is 0"),
        ({"half_life": 0.0}, "half_life"),
        ({"half_life": float("inf")}, "half_life"),
        ({"domain_minimum": {1: 1}}, "needs domain_history"),
        ({"domain_minimum": {1: 5}, "domain_history": np.zeros(3, dtype=np.int64)}, "at most 4"),
        ({"time_history": np.array([1, 3, 2])}, "descends at position 2"),
        ({"time_history": np.array([1, 2])}, "levels_history has shape"),
        ({"levels_candidate": np.array([[1], [1]])}, "levels_candidate has shape"),
        ({"request_time": np.array([29])}, "newer than itself"),
    ],
)
def test_refuses(change: Inputs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hierarchical_search(**one_request([[1], [2], [1]], [1]) | change)


def graded_recall(true: Ints, known: Ints, levels: list[int], paths: Ints, kept: int = 50) -> float:
    """Mean over candidates of the grades found by a search over some levels, over the best `kept` grades."""
    many, asked = true.shape[1], paths.shape[1]
    found = hierarchical_search(
        levels_history=known[levels],
        time_history=np.arange(many),
        levels_candidate=paths[levels],
        request_of_candidate=np.zeros(asked, dtype=np.int64),
        visible_start=np.array([0]),
        visible_end=np.array([many]),
        request_time=np.array([many]),
        budget=kept,
        half_life=100.0,
    )
    grade = np.logical_and.accumulate(true[:, None] == paths[:, :, None], axis=0).sum(axis=0)
    got = np.where(found.index >= 0, np.take_along_axis(grade, found.index.clip(min=0), axis=1), 0)
    best = -np.sort(-grade, axis=1)[:, :kept]
    return float(np.mean(got.sum(axis=1) / best.sum(axis=1)))


def test_planted_recall() -> None:
    """A third of the events is known to level 1 alone, a third to level 2, a third to the leaf."""
    rng = np.random.default_rng(7)
    scores: dict[str, list[float]] = {"hierarchical": [], "leaf": [], "L2": [], "L1": []}
    for _ in range(5):
        # ids are unique down the tree here, so that a search over the leaf alone is a fair rival
        coarse, middle, fine = rng.integers(1, 21, 2000), rng.integers(0, 10, 2000), rng.integers(0, 10, 2000)
        true = np.stack([coarse, 10 * coarse + middle, 100 * coarse + 10 * middle + fine])
        known = np.where(np.arange(3)[:, None] <= rng.integers(0, 3, 2000), true, 0)
        paths = true[:, rng.choice(2000, 200, replace=False)]
        for name, levels in {"hierarchical": [0, 1, 2], "leaf": [2], "L2": [1], "L1": [0]}.items():
            scores[name].append(graded_recall(true, known, levels, paths))
    mean = {name: float(np.mean(values)) for name, values in scores.items()}
    assert mean["hierarchical"] >= 0.95
    assert mean["leaf"] < 0.15 and mean["L2"] < 0.5
    assert mean["hierarchical"] > mean["L1"] + 0.03
