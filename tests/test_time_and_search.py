"""Stage one: windows, age buckets, and the batched search against one candidate at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.logs import FEATURES, Shape, random_rows, write_log
from trainer.config import DataConfig
from trainer.data.batch import RequestBatch
from trainer.data.reader import SequenceLogReader
from trainer.model.search import dot_search, dot_search_reference, windows_of
from trainer.model.time import AGE_BUCKETS, TimeBias, age_bucket


def test_age_buckets_grow_with_age_and_stay_in_range() -> None:
    ages = torch.tensor([1, 2, 3, 60, 3600, 86_400, 31_536_000, 2**40])
    buckets = age_bucket(ages)
    assert buckets[0] == 1 and (buckets.diff() >= 0).all()
    assert int(buckets.max()) == AGE_BUCKETS - 1 and int(buckets.min()) >= 1
    assert int(age_bucket(torch.tensor([86_400 * 2]))) - int(age_bucket(torch.tensor([86_400]))) == 2


def read_batch(path: Path, seed: int, history_length: int) -> RequestBatch:
    log = write_log(path, {"train": random_rows(seed, Shape(users=4, behaviors=25))})
    config = DataConfig(log=log, history_length=history_length, batch_candidates=10_000, prefetch=0)
    return next(iter(SequenceLogReader(config, "train", FEATURES).steps())).batch


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12), history_length=st.integers(1, 30))
def test_batched_search_equals_the_reference(
    tmp_path_factory, seed: int, k: int, history_length: int
) -> None:
    batch = read_batch(tmp_path_factory.mktemp("log") / "log", seed, history_length)
    rng = torch.Generator().manual_seed(seed)
    query = torch.randn(batch.candidates, 8, generator=rng)
    key = torch.randn(batch.behaviors, 8, generator=rng)
    bias = TimeBias(history_length, position=True, age=True)
    torch.nn.init.normal_(bias.position, generator=rng)
    torch.nn.init.normal_(bias.age, generator=rng)
    windows = windows_of(batch)
    with torch.no_grad():
        fast = dot_search(query, key, bias, windows, batch.candidate_request, k)
        slow = dot_search_reference(query, key, bias, windows, batch.candidate_request, k)
    assert torch.equal(fast.mask, slow.mask)
    assert torch.equal(fast.index, slow.index)
    start, end = (x[batch.candidate_request][:, None] for x in (batch.window_start, batch.window_end))
    inside = (fast.index >= start) & (fast.index < end)
    assert inside[fast.mask].all()


def test_search_of_nothing_keeps_nothing() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    windows_index = torch.zeros(2, 0, dtype=torch.int64)
    from trainer.model.search import Windows

    windows = Windows(windows_index, windows_index.bool(), windows_index, windows_index)
    bias = TimeBias(4, position=True, age=True)
    kept = dot_search(torch.randn(3, 4), torch.randn(0, 4), bias, windows, torch.tensor([0, 0, 1]), 2)
    assert not kept.mask.any() and kept.index.shape == (3, 2)
    none = dot_search(torch.randn(0, 4), torch.randn(5, 4), bias, windows, empty, 2)
    assert none.index.shape == (0, 2)


def test_windows_list_the_newest_first(tmp_path: Path) -> None:
    batch = read_batch(tmp_path / "log", 3, 7)
    windows = windows_of(batch)
    for r in range(batch.requests):
        seen = windows.index[r][windows.mask[r]].tolist()
        assert seen == list(range(int(batch.window_end[r]) - 1, int(batch.window_start[r]) - 1, -1))
        assert windows.rank[r][windows.mask[r]].tolist() == list(np.arange(1, len(seen) + 1))
