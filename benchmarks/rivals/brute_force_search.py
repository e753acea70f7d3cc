"""The hierarchical hard search by brute force: what `trainer.data.hard_search` must equal."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trainer.data.hard_search import Ints, SearchResult


def hierarchical_search_reference(
    levels_history: Ints,
    time_history: Ints,
    levels_candidate: Ints,
    request_of_candidate: Ints,
    visible_start: Ints,
    visible_end: Ints,
    request_time: Ints,
    budget: int,
    half_life: float,
    domain_history: Ints | None = None,
    domain_minimum: Mapping[int, int] | None = None,
) -> SearchResult:
    """What `hierarchical_search` must equal: each candidate scores and sorts all of its history."""
    depth, many = levels_candidate.shape
    index, level = np.full((many, budget), -1), np.zeros((many, budget), dtype=np.int8)
    matches, decayed = np.zeros((many, depth), dtype=np.int64), np.zeros((many, depth), dtype=np.float32)
    for candidate, request in enumerate(request_of_candidate):
        path = levels_candidate[:, candidate, None]
        equal = np.logical_and.accumulate((levels_history == path) & (path > 0), axis=0)
        position = np.arange(time_history.size)
        equal &= (position >= visible_start[request]) & (position < visible_end[request])
        score = equal.sum(axis=0)
        weight = np.exp2(-np.where(score > 0, request_time[request] - time_history, 0) / half_life)
        matches[candidate] = equal.sum(axis=1)
        decayed[candidate] = (equal * weight).sum(axis=1)
        order = np.lexsort((-position, -score))[: np.count_nonzero(score)]
        kept = np.zeros(position.size, dtype=np.bool_)
        for name, least in (domain_minimum or {}).items():
            kept[order[np.asarray(domain_history)[order] == name][:least]] = True
        kept[order[~kept[order]][: budget - np.count_nonzero(kept)]] = True
        result = order[kept[order]]
        index[candidate, : len(result)], level[candidate, : len(result)] = result, score[result]
    return SearchResult(index, level, matches, decayed)
