"""A sample of a split: whole users, the same ones at every reading and world size; the rest stays closed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trainer.data.sample as module
from tests.helpers.logs import FEATURES, Shape, random_rows, write_log
from tests.trainer.data.test_reader import Sample as Candidate
from tests.trainer.data.test_reader import config, samples, watch_decoding, watch_planning
from trainer.data.reader import SequenceLogReader
from trainer.data.sample import Sample


def reader(log: Path, rank: int, world_size: int, limit: int, **changes: Any) -> SequenceLogReader:
    settings = config(log, **changes)
    return SequenceLogReader(settings, "train", FEATURES, rank=rank, world_size=world_size, limit=limit)


def read(log: Path, world_size: int, limit: int, **changes: Any) -> Counter[Candidate]:
    found: Counter[Candidate] = Counter()
    for rank in range(world_size):
        for step in reader(log, rank, world_size, limit, **changes).steps():
            if step.counted:
                found.update(samples(step.batch))
    return found


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    limit=st.integers(1, 150),
    world_size=st.sampled_from([1, 2, 3]),
    sharding=st.sampled_from(["steps", "row_groups"]),
    fewest=st.sampled_from([1, 256]),
)
def test_a_sample_is_every_candidate_of_its_users_in_the_row_groups_drawn(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    limit: int,
    world_size: int,
    sharding: str,
    fewest: int,
) -> None:
    log = write_log(tmp_path_factory.mktemp("log") / "log", {"train": random_rows(seed, Shape(users=24))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FEWEST", fewest)
        whole, drawn = reader(log, 0, 1, 0), reader(log, 0, 1, limit)
        found = read(log, world_size, limit, sharding=sharding)
        # Twice the same, on any number of ranks, by any number of threads.
        assert found == read(log, 1, limit, workers=0) == read(log, 1, limit, batch_candidates=50)
    every = read(log, 1, 0)
    if drawn.sample is None:
        assert drawn.candidates <= limit and found == every
        return
    assert set(drawn.row_groups) <= set(whole.row_groups) and drawn.candidates == whole.candidates
    users = {user for user in {key[0] for key in every} if drawn.sample.holds(np.array([user]))[0]}
    if fewest > len(whole.row_groups):
        assert drawn.row_groups == whole.row_groups
        assert found == Counter({key: count for key, count in every.items() if key[0] in users})
    else:
        assert found <= every and {key[0] for key in found} <= users


def test_a_sample_opens_no_other_row_group_and_decodes_none_without_its_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = write_log(tmp_path / "log", {"train": random_rows(3, Shape(users=60))}, layout=(1, 4))
    monkeypatch.setattr(module, "_FEWEST", 1)
    planned, decoded = watch_planning(monkeypatch), watch_decoding(monkeypatch)
    drawn = reader(log, 0, 1, 20, workers=2)
    users = {int(user) for step in drawn.steps() for user in step.batch.user_id}
    assert drawn.sample is not None and len(planned) == drawn.sample.row_groups < 30
    # A row is a row group here.
    assert 0 < len(decoded) == len(users) < len(planned)


@pytest.mark.parametrize("users", [np.arange(100_000), np.arange(0, 6_400_000, 64), -np.arange(1, 100_001)])
def test_any_ids_are_drawn_evenly_and_a_larger_sample_holds_a_smaller_one(users: Any) -> None:
    small, large = Sample(1, 0.1).holds(users), Sample(1, 0.3).holds(users)
    # Four standard deviations of a count of 100,000 draws.
    assert abs(small.mean() - 0.1) < 0.004 and abs(large.mean() - 0.3) < 0.006
    assert not (small & ~large).any()
    # By no order: every tenth part has its share.
    assert all(abs(part.mean() - 0.1) < 0.013 for part in np.split(small, 10))


def test_sizes() -> None:
    assert Sample.of(500, 10, 500) is None and Sample.of(10**9, 10**6, 0) is None
    # Few row groups are all opened, of many some more than the sample would fill.
    assert Sample.of(1000, 200, 100) == Sample(200, pytest.approx(0.1))
    assert Sample.of(10**9, 10**6, 10**6) == Sample(4000, 0.25)
    assert Sample.of(101, 10**6, 100) == Sample(10**6, pytest.approx(100 / 101))
