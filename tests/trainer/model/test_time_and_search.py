"""Stage one: windows, age buckets, and the batched search against one candidate at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.logs import FEATURES, Shape, random_rows, write_log
from tests.helpers.model_references import search_reference
from trainer.config.sections import DataConfig
from trainer.data.batch import RequestBatch
from trainer.data.reader import SequenceLogReader
from trainer.model.ops.top import top_columns
from trainer.model.retrieve.dot import DotSearch
from trainer.model.retrieve.score import AttentionVectors, DotScorer
from trainer.model.retrieve.search import Query
from trainer.model.time import AGE_BUCKETS, Marks, TimeBias, age_bucket
from trainer.model.windows import Selection, Windows, windows_of


def test_age_buckets_grow_with_age_and_stay_in_range() -> None:
    ages = torch.tensor([1, 2, 3, 60, 3600, 86_400, 31_536_000, 2**40])
    buckets = age_bucket(ages)
    assert buckets[0] == 1 and (buckets.diff() >= 0).all()
    assert int(buckets.max()) == AGE_BUCKETS - 1 and int(buckets.min()) >= 1
    assert int(age_bucket(torch.tensor([86_400 * 2]))) - int(age_bucket(torch.tensor([86_400]))) == 2


def test_age_buckets_are_exact_at_every_border() -> None:
    """Floor of twice the binary logarithm, plus one, in whole numbers: how many bits the square has."""
    near = {int(2 ** (half / 2)) + step for half in range(80) for step in (-1, 0, 1)}
    seconds = sorted(near | set(range(1, 3000)))[1:]
    wanted = [min((second * second).bit_length(), AGE_BUCKETS - 1) for second in seconds]
    assert age_bucket(torch.tensor(seconds)).tolist() == wanted


def read_batch(path: Path, seed: int, history_length: int) -> RequestBatch:
    log = write_log(path, {"train": random_rows(seed, Shape(users=4, behaviors=25))})
    config = DataConfig(log=log, history_length=history_length, batch_candidates=10_000, prefetch=0)
    return next(iter(SequenceLogReader(config, "train", FEATURES).steps())).batch


def query_of(query: Tensor, key: Tensor, windows: Windows, bias: TimeBias | None = None) -> Query:
    """A dot product search with one head."""
    raw = AttentionVectors(query, key, torch.zeros(query.shape[0], dtype=torch.int64))
    scorer = DotScorer(None, None, 1, bias, None)
    return Query(scorer, scorer.encode(raw), raw, windows)


def drawn_bias(rows: dict[str, int], rng: torch.Generator) -> TimeBias:
    bias = TimeBias(rows)
    for table in bias.parameters():
        torch.nn.init.normal_(table, generator=rng)
    return bias


def nothing(width: int, of_candidate: list[int]) -> Windows:
    none = torch.zeros(2, width, dtype=torch.int64)
    return Windows(none, none.bool(), Marks(none, none, none), None, torch.tensor(of_candidate).long())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12), history_length=st.integers(1, 30))
def test_batched_search_equals_the_reference(
    tmp_path_factory, seed: int, k: int, history_length: int
) -> None:
    batch = read_batch(tmp_path_factory.mktemp("log") / "log", seed, history_length)
    rng = torch.Generator().manual_seed(seed)
    query = torch.randn(batch.candidates, 8, generator=rng)
    key = torch.randn(batch.behaviors, 8, generator=rng)
    bias = drawn_bias({"position": history_length + 1, "age": AGE_BUCKETS}, rng)
    asked = query_of(query, key, windows_of(batch, history_length), bias)
    with torch.no_grad():
        fast, slow = DotSearch(k)(asked), search_reference(asked, k)
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
    asked = query_of(torch.ones(batch.candidates, 4), torch.ones(batch.behaviors, 4), windows_of(batch, 25))
    kept: Selection = DotSearch(3)(asked)
    assert kept.marks.position[kept.mask].max() <= 3


def test_bias_gradients_are_the_same_bits_with_two_threads() -> None:
    """More than 32,768 indices: a backward that adds atomically would differ from run to run."""
    rng = torch.Generator().manual_seed(0)
    rank = torch.randint(0, 50, (4096, 20), generator=rng)
    gradient = torch.randn(4096, 20, generator=rng)
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for _ in range(20):
            bias = TimeBias({"position": 51, "age": 64})
            bias.shared(Marks(rank, rank, rank)).backward(gradient)
            found.append(torch.cat([table.grad for table in bias.parameters()]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found)


def test_search_of_nothing_keeps_nothing() -> None:
    kept = DotSearch(2)(query_of(torch.randn(3, 4), torch.zeros(1, 4), nothing(1, [0, 0, 1])))
    assert not kept.mask.any() and kept.index.shape == (3, 2)
    nobody = query_of(torch.randn(0, 4), torch.randn(5, 4), nothing(1, []))
    assert DotSearch(2)(nobody).index.shape == (0, 2)


def test_windows_list_the_newest_first(tmp_path: Path) -> None:
    batch = read_batch(tmp_path / "log", 3, 7)
    windows = windows_of(batch, 7)
    for r in range(batch.requests):
        seen = windows.index[r][windows.mask[r]].tolist()
        assert seen == list(range(int(batch.window_end[r]) - 1, int(batch.window_start[r]) - 1, -1))
        assert windows.marks.position[r][windows.mask[r]].tolist() == list(np.arange(1, len(seen) + 1))
