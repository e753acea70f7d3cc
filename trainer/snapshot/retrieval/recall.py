"""Indexes over a file of vectors: built head by head, and held against all inner products."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.log.bags import Ints
from trainer.snapshot.retrieval.indexes.kind import IndexKind, Setting
from trainer.snapshot.retrieval.vector_files import Floats, MeasuredRecall, vectors_of

KS = (10, 100)
# Among rows whose products are as close as rounding, either one is right.
_ROUNDING = 1e-5
# Vectors that a sample is drawn from are read in pieces of a row group; of each, every n-th is taken.
_ADDED = 1 << 16


@dataclass(frozen=True)
class Queries:
    """What looks for rows.

    Attributes:
        vector: float32 [Q, width].
        rows: [Q, 2], the stretch [start, stop) of rows that each query looks through.
    """

    vector: Floats
    rows: Ints

    def of_head(self, head: int, heads: int) -> Queries:
        return Queries(head_of(self.vector, head, heads), self.rows)

    def stretches(self) -> list[tuple[slice, Ints]]:
        """Each stretch of rows, and the queries that look through it."""
        found, which = np.unique(self.rows, axis=0, return_inverse=True)
        which = which.reshape(-1)
        return [(slice(*map(int, row)), np.flatnonzero(which == i)) for i, row in enumerate(found)]


class Timed(NamedTuple):
    """A recall, and how long one query took on one thread, in milliseconds."""

    recall: MeasuredRecall
    milliseconds: float


def head_of(vectors: Floats, head: int, heads: int) -> Floats:
    """One of the equal slices of vectors, in memory of its own."""
    width = vectors.shape[1] // heads
    return np.ascontiguousarray(vectors[:, head * width : (head + 1) * width])


def best_products(file: Path, queries: Queries, k: int, head: int = 0, heads: int = 1) -> tuple[Floats, Ints]:
    """The K largest inner products of each query, [Q, K], best first, and their rows; -inf and -1 beyond.

    Every row is looked at, in one pass over the file: the reference that an index is held against.
    """
    import faiss

    found = np.full((len(queries.vector), k), -np.inf, dtype=np.float32)
    rows = np.full((len(queries.vector), k), -1, dtype=np.int64)
    stretches = queries.stretches()
    for first, vectors in vectors_of(file):
        base = head_of(vectors, head, heads)
        for stretch, asked in stretches:
            low, high = max(stretch.start - first, 0), min(stretch.stop - first, len(base))
            if low >= high:
                continue
            given = np.ascontiguousarray(queries.vector[asked])
            some, place = faiss.knn(
                given, base[low:high], min(k, high - low), metric=faiss.METRIC_INNER_PRODUCT
            )
            both = np.concatenate([found[asked], some], axis=1)
            where = np.concatenate([rows[asked], place + first + low], axis=1)
            order = np.argsort(-both, axis=1, kind="stable")[:, :k]
            found[asked] = np.take_along_axis(both, order, 1)
            rows[asked] = np.take_along_axis(where, order, 1)
    return found, rows


def build_index(file: Path, kind: IndexKind, head: int = 0, heads: int = 1) -> Any:
    """A `faiss.Index` over one head of all rows, row n under the id n."""

    def sample(count: int) -> Floats:
        every = max(kind.rows // max(count, 1), 1)
        parts = [
            head_of(vectors[-first % every :: every], head, heads) for first, vectors in vectors_of(file)
        ]
        return np.concatenate(parts)[:count]

    index = kind.empty(sample)
    for _, vectors in vectors_of(file):
        for begin in range(0, len(vectors), _ADDED):
            index.add(head_of(vectors[begin : begin + _ADDED], head, heads))
    return index


def measured(
    index: Any, kind: IndexKind, setting: Setting, queries: Queries, best: Floats, ks: Sequence[int]
) -> list[Timed]:
    """Recall of one setting for each K; `best`: [Q, largest K] of `best_products`.

    A row counts if its product is among the K largest, whatever its number: rows of equal products are alike.
    Where a query has fewer rows than K to look through, these are all that could be found.
    """
    import faiss

    found = np.full_like(best, -np.inf)
    began = time.perf_counter()
    for stretch, asked in queries.stretches():
        whole = stretch == slice(0, kind.rows)
        chosen = None if whole else faiss.IDSelectorRange(stretch.start, stretch.stop)
        params = kind.options(setting, chosen)
        given = np.ascontiguousarray(queries.vector[asked])
        products, _ = index.search(given, best.shape[1], params=params)
        # FAISS fills up with the smallest float.
        found[asked] = np.where(products > np.finfo(np.float32).min, products, -np.inf)
    took = 1000 * (time.perf_counter() - began) / max(len(queries.vector), 1)
    timed = []
    for k in ks:
        there = np.isfinite(best[:, :k])
        least = np.where(there, best[:, :k], np.inf).min(1)
        slack = _ROUNDING * np.maximum(np.abs(least), 1.0)
        right = (found[:, :k] >= (least - slack)[:, None]) & np.isfinite(found[:, :k])
        share = float(np.minimum(right.sum(1), there.sum(1)).sum() / max(there.sum(), 1))
        asked_k = MeasuredRecall(setting=setting, k=k, queries=len(queries.vector), recall=share)
        timed.append(Timed(asked_k, took))
    return timed
