"""Clusters of a lifelong history (TWIN-V2, Kuaishou 2024), made offline, chunk by chunk.

A history is cut into chunks of a fixed number of behaviors. Inside a chunk, the behaviors with one value of a
feature are split by k-means on item vectors until no cluster holds more than `cap`. The member nearest to the
centre represents its cluster: the cluster has its ids, the number of members, and their mean time.

The paper does not cut histories into chunks; this code does, so that a cluster never changes once its chunk
is complete. A new event then costs nothing but its own chunk, and a request sees the clusters of the chunks
that were complete before it, whatever happened later. The recent module reads the behaviors since then.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.config.toml import Settings

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

_ROUNDS = 10


class ClusterInfo(Settings):
    """How a log's histories were clustered: part of its manifest."""

    chunk: int
    """The behaviors of a chunk."""
    cap: int
    """The most behaviors that a cluster may have."""
    group_by: str = ""
    """The feature whose values are clustered apart; empty: none."""
    seed: int = 0
    """The seed of k-means."""
    source: str = ""
    """The digest of the snapshot whose vectors were used."""


@dataclass(frozen=True)
class HistoryClusters:
    """Clusters of one history of N behaviors.

    Attributes:
        label: int64 [N], cluster of each behavior, counted over the history; -1 in the last, open chunk.
        size: int64 [N], members of the cluster that the behavior represents, else 0.
        time: int64 [N], mean time of these members (rounded down), else 0.
    """

    label: Ints
    size: Ints
    time: Ints


def cluster_history(vectors: Floats, groups: Ints, times: Ints, info: ClusterInfo) -> HistoryClusters:
    """Cluster the complete chunks of one history.

    Args:
        vectors: [N, D] of the behaviors, oldest first; groups: [N], value of the grouping feature.
        times: [N], seconds; info: chunk, cap and seed.
    """
    count = times.size
    label, size = np.full(count, -1, dtype=np.int64), np.zeros(count, dtype=np.int64)
    time, clusters = np.zeros(count, dtype=np.int64), 0
    for begin in range(0, count - info.chunk + 1, info.chunk):
        chunk = np.arange(begin, begin + info.chunk)
        # The seed depends on the place alone: clustering again changes nothing.
        rng = np.random.default_rng([info.seed, begin])
        for value in np.unique(groups[chunk]):
            for members in split_to_cap(chunk[groups[chunk] == value], vectors, info.cap, rng):
                label[members], clusters = clusters, clusters + 1
                distance = ((vectors[members] - vectors[members].mean(0)) ** 2).sum(1)
                stands = members[distance.argmin()]
                size[stands], time[stands] = members.size, int(times[members].mean())
    return HistoryClusters(label, size, time)


def split_to_cap(members: Ints, vectors: Floats, cap: int, rng: np.random.Generator) -> list[Ints]:
    """Split by k-means into floor(n ** 0.3) parts (at least two), again and again, until none exceeds `cap`.

    The exponent is TWIN-V2's as remembered, not looked up; any number of parts gives a valid partition.
    """
    done, open_ = [], [members]
    while open_:
        part = open_.pop()
        if part.size <= cap:
            done.append(part)
            continue
        count = max(2, int(part.size**0.3))
        nearest = k_means(vectors[part], count, rng)
        pieces = [part[nearest == k] for k in range(count) if (nearest == k).any()]
        if len(pieces) == 1:  # all alike: no distance tells them apart, so time does
            pieces = np.array_split(part, count)
        open_ += pieces
    return done


def k_means(vectors: Floats, count: int, rng: np.random.Generator) -> Ints:
    """Lloyd's rounds from `count` random members -> [n], the nearest centre of each vector."""
    centres = vectors[rng.choice(vectors.shape[0], count, replace=False)]
    nearest = np.zeros(vectors.shape[0], dtype=np.int64)
    for round_ in range(_ROUNDS):
        distance = (centres**2).sum(1) - 2 * vectors @ centres.T
        moved, nearest = nearest, distance.argmin(1)
        if round_ and np.array_equal(moved, nearest):
            break
        for k in range(count):
            if (nearest == k).any():
                centres[k] = vectors[nearest == k].mean(0)
    return nearest
