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
from trainer.model.search import Windows, dot_search, dot_search_reference, top_columns, windows_of
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
    windows = windows_of(batch, history_length)
    with torch.no_grad():
        fast = dot_search(query, key, bias, windows, k)
        slow = dot_search_reference(query, key, bias, windows, k)
    assert torch.equal(fast.mask, slow.mask)
    assert torch.equal(fast.index, slow.index)
    start, end = (x[batch.candidate_request][:, None] for x in (batch.window_start, batch.window_end))
    inside = (fast.index >= start) & (fast.index < end)
    assert inside[fast.mask].all()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.0, -torch.inf]), min_size=6, max_size=6), min_size=1),
    k=st.integers(1, 8),
    padding=st.sampled_from([0, 1, 300, 2000]),
)
def test_ties_go_to_the_newest_whatever_the_padding(rows: list[list[float]], k: int, padding: int) -> None:
    score = torch.nn.functional.pad(torch.tensor(rows), (0, padding), value=-torch.inf)
    column, mask = top_columns(score, k)
    for values, columns, counted in zip(rows, column, mask, strict=True):
        best = sorted((i for i, v in enumerate(values) if v > -torch.inf), key=lambda i: (-values[i], i))[:k]
        assert columns[counted].tolist() == sorted(best)


def test_repeated_items_score_alike_in_any_company(tmp_path: Path) -> None:
    """With equal keys and no time bias every score ties: the newest are kept, beside long windows too."""
    batch = read_batch(tmp_path / "log", 5, 25)
    bias = TimeBias(25, position=False, age=False)
    windows = windows_of(batch, 25)
    kept = dot_search(torch.ones(batch.candidates, 4), torch.ones(batch.behaviors, 4), bias, windows, 3)
    assert kept.rank[kept.mask].max() <= 3


def test_bias_gradients_are_the_same_bits_with_two_threads() -> None:
    """More than 32,768 indices: a backward that adds atomically would differ from run to run."""
    rng = torch.Generator().manual_seed(0)
    rank = torch.randint(0, 50, (4096, 20), generator=rng)
    gradient = torch.randn(4096, 20, generator=rng)
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for _ in range(20):
            bias = TimeBias(50, position=True, age=True)
            bias(rank, rank).backward(gradient)
            found.append(torch.cat([bias.position.grad, bias.age.grad]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)


def test_search_of_nothing_keeps_nothing() -> None:
    none = torch.zeros(2, 0, dtype=torch.int64)
    windows = Windows(none, none.bool(), none, none, torch.tensor([0, 0, 1]))
    bias = TimeBias(4, position=True, age=True)
    kept = dot_search(torch.randn(3, 4), torch.randn(0, 4), bias, windows, 2)
    assert not kept.mask.any() and kept.index.shape == (3, 2)
    nobody = Windows(none, none.bool(), none, none, torch.zeros(0, dtype=torch.int64))
    assert dot_search(torch.randn(0, 4), torch.randn(5, 4), bias, nobody, 2).index.shape == (0, 2)


def test_windows_list_the_newest_first(tmp_path: Path) -> None:
    batch = read_batch(tmp_path / "log", 3, 7)
    windows = windows_of(batch, 7)
    for r in range(batch.requests):
        seen = windows.index[r][windows.mask[r]].tolist()
        assert seen == list(range(int(batch.window_end[r]) - 1, int(batch.window_start[r]) - 1, -1))
        assert windows.rank[r][windows.mask[r]].tolist() == list(np.arange(1, len(seen) + 1))
