"""TWIN-V2's clusters: caps, partition, groups, causality, and the ln-size identity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.log.clusters import ClusterInfo, cluster_history, split_to_cap
from trainer.model.retrieve.score import AttentionVectors, DotScorer, softmax_weights
from trainer.model.time import Marks
from trainer.model.windows import Windows


def drawn_history(seed: int, count: int, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(6, 4))
    vectors = (centres[rng.integers(0, 6, count)] + 0.1 * rng.normal(size=(count, 4))).astype(np.float32)
    return vectors, rng.integers(0, groups, count), np.sort(rng.integers(0, 10_000, count))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(0, 300),
    chunk=st.integers(1, 120),
    cap=st.integers(1, 25),
    groups=st.integers(1, 4),
)
def test_clusters_are_a_partition_of_pure_groups_below_the_cap(
    seed: int, count: int, chunk: int, cap: int, groups: int
) -> None:
    vectors, group, times = drawn_history(seed, count, groups)
    found = cluster_history(vectors, group, times, ClusterInfo(chunk=chunk, cap=cap))
    closed = count // chunk * chunk
    assert (found.label[closed:] == -1).all() and (found.label[:closed] >= 0).all()
    assert found.size.sum() == closed
    for label in np.unique(found.label[:closed]):
        members = np.nonzero(found.label == label)[0]
        stands = members[found.size[members] > 0]
        assert members.size <= cap and stands.size == 1 and found.size[stands[0]] == members.size
        assert np.unique(group[members]).size == 1 and np.unique(members // chunk).size == 1
        assert found.time[stands[0]] == int(times[members].mean())
        distance = ((vectors[members] - vectors[members].mean(0)) ** 2).sum(1)
        assert distance[members == stands[0]] == pytest.approx(distance.min())


def test_later_events_and_clustering_again_change_no_cluster() -> None:
    vectors, group, times = drawn_history(3, 260, 2)
    info = ClusterInfo(chunk=50, cap=8, seed=4)
    before = cluster_history(vectors[:120], group[:120], times[:120], info)
    after = cluster_history(vectors, group, times, info)
    again = cluster_history(vectors, group, times, info)
    for name in ("label", "size", "time"):
        assert np.array_equal(getattr(after, name), getattr(again, name))
        assert np.array_equal(getattr(before, name)[:100], getattr(after, name)[:100])
    assert (before.label[100:] == -1).all() and (after.label[100:250] >= 0).all()


def test_members_that_are_all_alike_are_split_by_time() -> None:
    parts = split_to_cap(np.arange(100), np.ones((100, 3), np.float32), 7, np.random.default_rng(0))
    assert max(part.size for part in parts) <= 7 and sorted(np.concatenate(parts)) == list(range(100))


def test_near_behaviors_share_a_cluster() -> None:
    """Two kinds far apart are never mixed, and sizes stay near the cap."""
    rng = np.random.default_rng(1)
    kind = rng.integers(0, 2, 400)
    vectors = (kind[:, None] * 10 + rng.normal(size=(400, 3))).astype(np.float32)
    found = cluster_history(vectors, np.zeros(400, np.int64), np.arange(400), ClusterInfo(chunk=400, cap=20))
    for label in np.unique(found.label):
        assert np.unique(kind[found.label == label]).size == 1
    assert np.unique(found.label).size < 400 / 4


def attention(query: torch.Tensor, key: torch.Tensor, log_size: torch.Tensor | None) -> torch.Tensor:
    n = key.shape[0]
    index = torch.arange(n)[None]
    zero = torch.zeros_like(index)
    windows = Windows(index, torch.ones_like(index, dtype=torch.bool), Marks(zero, zero, zero), log_size,
                      torch.zeros(query.shape[0], dtype=torch.int64))  # fmt: skip
    scorer = DotScorer(None, None, 1, None, None)
    vectors = scorer.encode(AttentionVectors(query, key, torch.zeros(query.shape[0], dtype=torch.int64)))
    kept = windows.of_candidates()
    over, of = scorer.over_windows(vectors, windows), scorer.of_kept(vectors, kept)
    assert torch.allclose(over, of, atol=1e-6)
    return softmax_weights(over[:, 0], kept.mask) @ key


def test_attention_to_clusters_of_equal_members_is_attention_to_the_members() -> None:
    """The identity that + ln n makes exact, in both stages; without it the error is large."""
    rng = torch.Generator().manual_seed(0)
    query, distinct = torch.randn(3, 8, generator=rng), torch.randn(5, 8, generator=rng)
    sizes = torch.tensor([1, 2, 7, 20, 3])
    members = distinct.repeat_interleave(sizes, dim=0)
    exact = attention(query, members, None)
    assert torch.allclose(attention(query, distinct, sizes.log()[None]), exact, atol=1e-6)
    assert (attention(query, distinct, None) - exact).abs().max() > 0.05
