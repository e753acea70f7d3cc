"""A user's state is compared with what is sent; that it was found, extended or made shows in no bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.logs import write_log
from tests.helpers.models import preset
from tests.helpers.presets import PRESETS
from tests.helpers.serving import rows_of, snapshot_of
from tests.trainer.serving.test_scorer import TAXONOMY, asked, taxonomy_rows
from trainer.log.bags import Bags
from trainer.serving.checks import cut_history
from trainer.serving.request import History, Request
from trainer.serving.scorer import Scorer
from trainer.serving.user_state.cache import Outcome, StateCache
from trainer.serving.user_state.second_level import SecondLevel
from trainer.serving.user_state.settings import UserStateSettings
from trainer.serving.user_state.state import Stretch, UserState

ALL = UserStateSettings(least=1)
# The data path searches before the model does, and leaves other behaviors in every batch.
WITHOUT = {"best", "dare_search", "sim_hard"}


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Several blocks in short histories."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("state", "maker"):
            patch.setattr(f"trainer.serving.user_state.{module}.BLOCK", 4)
            patch.setattr(f"trainer.serving.user_state.{module}.LINE", 4, raising=False)
        yield


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("states") / "log"
    return write_log(path, {"train": taxonomy_rows()}, rich=True, more=TAXONOMY)


@lru_cache(maxsize=8)
def longest(scorer: Scorer, count: int = 1) -> list[Request]:
    """Of the users with most behaviors the request with the most."""
    rows = sorted(taxonomy_rows(), key=lambda row: -row["num_behaviors"])[: count + 1]
    named = asked(scorer, scorer.snapshot.manifest.config, rows)
    cut = sorted(
        (cut_history(request, scorer.needs) for _, request in named), key=lambda r: r.history.time.size
    )
    of_users = {request.user_id: request for request in cut}
    return sorted(of_users.values(), key=lambda request: -request.history.time.size)[:count]


def scores(scorer: Scorer, *requests: Request) -> list[np.ndarray]:
    cut = [cut_history(request, scorer.needs) for request in requests]
    return [answer.probabilities for answer in scorer.score(cut)[0]]


def without_newest(request: Request, count: int) -> Request:
    history = request.history
    return replace(request, history=history.part(slice(0, history.time.size - count)))


def outcomes(scorer: Scorer) -> dict[Outcome, int]:
    assert scorer.states is not None
    found = scorer.states.cache.statistics().outcomes
    return {name: count for name, count in found.items() if count}  # type: ignore[misc]


def forget(scorer: Scorer) -> None:
    assert scorer.states is not None
    scorer.states.cache = StateCache(ALL.bytes)


@pytest.mark.parametrize("name", PRESETS)
def test_hit_miss_and_extension_are_one_for_every_preset(name: str, log: Path) -> None:
    snapshot = snapshot_of(preset(name, log))
    plain = Scorer(snapshot)
    request, other = longest(plain, 2)
    (expected,) = scores(plain, request)
    for representation in (True, False):
        settings_ = UserStateSettings(least=1, representation=representation)
        scorer = Scorer(snapshot, user_states=settings_)
        # With and without looking for the behaviors that were kept: histories are short here.
        snapshot.model.branches.few = 512 if representation else 0
        scores(scorer, without_newest(request, 3), other)
        extended, hit = (scores(scorer, request)[0] for _ in range(2))
        found = outcomes(scorer)
        forget(scorer)
        (miss,) = scores(scorer, request)
        assert np.array_equal(hit, miss) and np.array_equal(hit, extended)
        assert np.abs(hit - expected).max() <= 1e-6
        assert found == ({} if name in WITHOUT else {"miss": 2, "extended": 1, "hit": 1})


@pytest.fixture(scope="module")
def long_scorers(log: Path) -> tuple[Scorer, Scorer]:
    """Projected keys and two branches; one that keeps states, and one that does not."""
    config = preset("twin", log, "data.history_length=23", "model.branches.recent.k=5")
    snapshot = snapshot_of(config)
    return Scorer(snapshot, user_states=ALL), Scorer(snapshot)


def drawn(scorer: Scorer, seed: int, count: int) -> History:
    """A history of `count` behaviors, of which those of a shorter one are the first."""
    features = {}
    rows = rows_of(scorer.snapshot.manifest.config)
    for place, (name, bags) in enumerate(longest(scorer)[0].history.features.items()):
        rng = np.random.default_rng([seed, place])
        lengths = (
            np.random.default_rng([seed, place, 1]).integers(0, 3, count)
            if bags.offsets is not None
            else None
        )
        total = count if lengths is None else int(lengths.sum())
        features[name] = Bags.of_lengths(rng.integers(0, rows.get(name, 1), total), lengths)
    return History(np.arange(count) * 10 + 10, features)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 60)), min_size=2, max_size=5))
def test_whatever_came_before_a_request_is_scored_as_by_a_server_that_has_just_started(
    steps: list[tuple[int, int]], long_scorers: tuple[Scorer, Scorer]
) -> None:
    """Histories of one user that grow, shrink, slide out of the window, or are of somebody else."""
    scorer, plain = long_scorers
    first = longest(plain)[0]
    requests = [
        replace(first, history=drawn(plain, seed, count), time=count * 10 + 15, user_id=7)
        for seed, count in steps
    ]
    forget(scorer)
    warm = [scores(scorer, request)[0] for request in requests]
    for request, mine in zip(requests, warm, strict=True):
        forget(scorer)
        assert np.array_equal(mine, scores(scorer, request)[0])
        assert np.abs(mine - scores(plain, request)[0]).max() <= 1e-6
    forget(scorer)
    together, others = scores(scorer, *requests), scores(plain, *requests)
    assert max(np.abs(a - b).max() for a, b in zip(together, others, strict=True)) <= 1e-6
    again = scores(scorer, *requests)
    assert all(np.array_equal(a, b) for a, b in zip(together, again, strict=True))


def test_outcomes_are_counted(long_scorers: tuple[Scorer, Scorer]) -> None:
    scorer, plain = long_scorers
    first = longest(plain)[0]

    def of(seed: int, count: int, **changes: int) -> Request:
        return replace(
            first, history=drawn(plain, seed, count), time=count * 10 + 15, **{"user_id": 7} | changes
        )

    forget(scorer)
    for request, expected in (
        (of(0, 20), {"miss": 1}),
        # Fewer of the same: the state has them.
        (of(0, 18), {"miss": 1, "hit": 1}),
        (of(0, 30), {"miss": 1, "hit": 1, "extended": 1}),
        # The window has gone on by more than all that is known.
        (of(0, 60), {"miss": 1, "hit": 1, "extended": 1, "stale": 1}),
        # Another history under the same number.
        (of(1, 60), {"miss": 1, "hit": 1, "extended": 1, "stale": 2}),
        (of(1, 60, user_id=8), {"miss": 2, "hit": 1, "extended": 1, "stale": 2}),
    ):
        scores(scorer, request)
        assert outcomes(scorer) == expected
    # Of one body, and without a number of the user: what the first makes, the second finds.
    forget(scorer)
    scores(scorer, of(2, 60, user_id=0), of(2, 60, user_id=0), of(3, 60, user_id=0))
    assert outcomes(scorer) == {"miss": 2, "hit": 1}


def test_a_later_behavior_that_is_another_is_noticed(long_scorers: tuple[Scorer, Scorer]) -> None:
    """A state is grown where it lies; that must not reach a history that went another way."""
    scorer, plain = long_scorers
    first = longest(plain)[0]
    grown = [replace(first, history=drawn(plain, 0, count), time=215, user_id=7) for count in (18, 19, 20)]
    other = grown[2].history
    values = {
        name: Bags.of_lengths(bags.values.copy(), bags.lengths) for name, bags in other.features.items()
    }
    values["item_id"].values[19] += 1 if values["item_id"].values[19] == 0 else -1
    changed = replace(grown[2], history=History(other.time, values))
    forget(scorer)
    for request in (*grown, changed, grown[2]):
        mine = scores(scorer, request)[0]
        assert np.abs(mine - scores(plain, request)[0]).max() <= 1e-6
    assert outcomes(scorer)["stale"] == 2
    assert not np.array_equal(scores(plain, changed)[0], scores(plain, grown[2])[0])


def test_a_short_history_has_no_state(long_scorers: tuple[Scorer, Scorer]) -> None:
    scorer = Scorer(long_scorers[0].snapshot, user_states=UserStateSettings(least=15))
    first = longest(scorer)[0]
    short, long = (
        replace(first, history=drawn(scorer, 0, count), time=1_000, user_id=count) for count in (14, 15)
    )
    assert scorer.states is not None
    assert scorer.states.known_for([short]) is None
    alone, beside = scores(long_scorers[1], short, long), scores(scorer, short, long)
    assert max(np.abs(a - b).max() for a, b in zip(alone, beside, strict=True)) <= 1e-6
    assert outcomes(scorer) == {"miss": 1}


class _Memory:
    """A store in this process."""

    def __init__(self) -> None:
        self.held: dict[bytes, bytes] = {}

    def get(self, key: bytes) -> bytes | None:
        return self.held.get(key)

    def put(self, key: bytes, parts: Sequence[bytes | memoryview]) -> None:
        self.held[key] = b"".join(parts)

    def close(self) -> None:
        pass


def test_a_state_of_another_process_is_as_good_as_an_own_one(
    long_scorers: tuple[Scorer, Scorer],
) -> None:
    scorer, plain = long_scorers
    store = SecondLevel(_Memory())
    mine, theirs = (Scorer(plain.snapshot, user_states=ALL, store=store) for _ in range(2))
    first = longest(plain)[0]
    short, long = (
        replace(first, history=drawn(plain, 0, count), time=1_000, user_id=7) for count in (18, 30)
    )
    scores(theirs, short)
    assert store.flush(10)
    extended = scores(mine, long)[0]
    forget(scorer)
    assert np.array_equal(extended, scores(scorer, long)[0])
    assert outcomes(mine) == {"extended": 1}
    # One that has other tensors is none, whoever put it under this key.
    assert mine.states is not None
    (found,) = mine.states.cache._states.values()
    forget(mine)
    store.put(replace(found, rows={"group/other": found.rows["branch/main/key"]}))
    assert store.flush(10)
    assert np.array_equal(extended, scores(mine, long)[0])
    assert outcomes(mine) == {"miss": 1}
    store.close()


def test_rows_that_are_no_numbers_do_not_outlive_the_table_that_had_them(log: Path) -> None:
    """Neither in memory nor in a store, where they would be found by the key of the sound version."""
    snapshot, store = snapshot_of(preset("dare", log)), SecondLevel(_Memory())
    scorer, plain = Scorer(snapshot, user_states=ALL, store=store), Scorer(snapshot)
    first = longest(plain)[0]
    short, long = (replace(first, history=drawn(plain, 0, count), time=1_000, user_id=7) for count in (8, 12))
    scores(scorer, short)
    (expected,) = scores(plain, long)
    item = int(long.history.features["item_id"].values[-1])
    names = dict(snapshot.model.named_parameters())
    table = next(names[name] for name in names if "attention" in name and "item_id" in name)
    sound = table.data[item].clone()
    table.data[item] = torch.nan
    assert np.isnan(scores(scorer, long)[0]).any()
    table.data[item] = sound
    assert store.flush(10) and store.statistics().writes["written"] == 1
    assert np.abs(scores(scorer, long)[0] - expected).max() <= 1e-6
    assert outcomes(scorer) == {"miss": 1, "extended": 2}
    store.close()


def state(user: int, behaviors: int = 8, width: int = 4) -> UserState:
    rng = np.random.default_rng(user)
    features = {
        "item": Bags(rng.integers(0, 9, behaviors)),
        "tags": Bags.of_lengths(np.arange(2 * behaviors), [2] * behaviors),
    }
    known = Stretch(4, np.arange(behaviors), features)
    return UserState(bytes([user]) * 32, known, 4, {"group/a": torch.randn(behaviors, width)})


def test_the_cache_holds_as_many_bytes_as_it_may() -> None:
    one = state(1).nbytes
    cache = StateCache(3 * one)
    for user in (1, 2, 3):
        cache.put(state(user))
    assert cache.get(state(1).key) is not None
    cache.put(state(4))
    # The second was used longest ago.
    assert [cache.get(state(user).key) is not None for user in (1, 2, 3, 4)] == [True, False, True, True]
    cache.put(state(4))
    cache.put(state(5, behaviors=100))
    found = cache.statistics()
    assert (found.entries, found.bytes, found.evicted, found.too_large) == (3, 3 * one, 1, 1)
    assert found.bytes_per_user == one
    cache.put(state(3, behaviors=100))
    assert cache.get(state(3).key) is None
    assert cache.statistics().bytes == 2 * one
    assert np.isnan(StateCache(0).statistics().bytes_per_user)


def test_a_state_comes_back_from_its_tensors() -> None:
    given_ = state(1)
    back = UserState.of(given_.key, given_.tensors())
    assert back.known.equals(given_.known) and back.origin == 4 and not back.writable
    assert torch.equal(back.rows["group/a"], given_.rows["group/a"])
    tensors = given_.tensors()
    for broken in (
        {name: part for name, part in tensors.items() if name != "time"},
        tensors | {"place": torch.tensor([4, 3])},
        tensors | {"place": torch.tensor([3, 4])},
        tensors | {"ids/item": torch.arange(3)},
        tensors | {"rows/group/a": torch.zeros(7, 4)},
    ):
        with pytest.raises(ValueError, match="no user's state"):
            UserState.of(given_.key, broken)


def test_stretches_are_told_apart() -> None:
    one = state(1).known
    assert one.equals(one.copy()) and one.cut(6, 9).equals(one.copy().cut(6, 9))
    assert one.cut(4, 8).join(one.cut(8, 12)).equals(one)
    assert not one.equals(replace(one, first=5))
    assert not one.equals(replace(one, time=one.time + 1))
    assert not one.equals(replace(one, features={"item": one.features["item"]}))
    other = Bags.of_lengths(np.arange(16), [1, 3] + [2] * 6)
    assert not one.equals(replace(one, features=dict(one.features) | {"tags": other}))
    assert one.digest() == one.cut(4, 11).digest() != replace(one, time=one.time + 1).digest()
