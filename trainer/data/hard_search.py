"""Hard and hierarchical hard search: the few behaviors of a long history that share a candidate's category.

Hard search keeps the newest behaviors of the candidate's category (SIM, section 3.2). The hierarchical
variant is our design: it takes the behaviors that match the candidate's taxonomy path deepest first, newest
first among equals, so a behavior whose fine category is unknown still counts at the coarse level it has. A
behavior matches at level l if levels 1 to l of both are known (not 0) and equal. It runs where logs are read
and cuts a history of tens of thousands of behaviors to the hundreds a model sees.

Letters in shapes: N behaviors, C candidates, R requests, m taxonomy levels (coarse to fine), K budget,
Q distinct queries among the candidates, P entries of the inverted lists (at most m * N).

Behaviors are found through inverted lists, one for each taxonomy node, positions ascending. The newest K
entries of each list are all that can matter: a coarser list is read only if fewer than K behaviors matched
deeper, and those are the only ones it can repeat, so K entries hold every new one that still has room. A
query therefore costs O(m (log P + K)), however long the history is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# What stands for "no node". The two differ, so that an unknown candidate never equals an unknown behavior.
_NO_NODE_BEHAVIOR = -1
_NO_NODE_CANDIDATE = -2


@dataclass(frozen=True)
class SearchResult:
    """The behaviors that a search keeps, one row a candidate.

    Attributes:
        index: int64 [C, K], positions in the given history, deepest match first, newest first among equals;
            -1 where fewer than K match.
        level: int8 [C, K], deepest taxonomy level at which that behavior matches, 1 (coarsest) to m; 0 where
            `index` is -1.
        matches: int64 [C, m], visible behaviors that match down to at least level 1, 2, ..., m. Counts cover
            the whole visible history, not only what the budget left, so they never rise with the level.
        decayed: float32 [C, m], the same counts with each behavior weighted by 2 ** (-age / half_life).
    """

    index: Ints
    level: npt.NDArray[np.int8]
    matches: Ints
    decayed: npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Lists:
    """Inverted lists laid end to end.

    Attributes:
        key: int64 [P], ascending, (node << bits) + position; nodes are numbered through all levels.
        bits: so many hold every position and N itself.
    """

    key: Ints
    bits: int

    def position(self, key: Ints) -> Ints:
        return key & ((1 << self.bits) - 1)

    def ranges(self, node: Ints, start: Ints, end: Ints) -> tuple[Ints, Ints]:
        """Entries [low, high) of each node with start <= position < end; empty for absent nodes."""
        low = np.searchsorted(self.key, (node << self.bits) + start)
        return low, np.maximum(np.searchsorted(self.key, (node << self.bits) + end), low)


@dataclass(frozen=True)
class _Queries:
    """The distinct queries among the candidates."""

    node: Ints  # [m, Q], the path
    low: Ints  # [m, Q], [low, high) is the visible part of each node's list
    high: Ints
    start: Ints  # [Q], [start, end) are the visible positions
    end: Ints
    time: Ints  # [Q], of the request


def hierarchical_search(
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
    """Keep, for each candidate, the `budget` visible behaviors that match its path deepest, newest first.

    Args:
        levels_history: int64 [m, N], levels_candidate: int64 [m, C], taxonomy ids of any sign, coarse to
            fine; 0 is unknown and matches nothing. The finest level may be the item itself.
        time_history: int64 [N], ascending (ties allowed), in any unit; request_time: int64 [R], the same.
        request_of_candidate: int64 [C]; visible_start, visible_end: int64 [R], start <= position < end.
        budget: K; half_life: age at which a behavior weighs half in `decayed`, in the unit of the times.
        domain_history: int64 [N]; domain_minimum: {domain: how many of its best matches have a place for
            certain}, together at most K. The general order fills the rest.

    Raises ValueError if an argument is out of its range or a visible behavior is newer than its request.
    """
    behaviors, history, minimum = time_history.size, levels_history.shape, domain_minimum or {}
    if history != (history[0], behaviors) or not 1 <= history[0] < 128:
        raise ValueError(f"levels_history has shape {history}, want [1 to 127 levels, {behaviors}]")
    shape = (history[0], request_of_candidate.size)
    if levels_candidate.shape != shape:
        raise ValueError(f"levels_candidate has shape {levels_candidate.shape}, want {shape}")
    if budget < 1:
        raise ValueError(f"budget is {budget}, want at least 1")
    if not 0 < half_life < np.inf:
        raise ValueError(f"half_life is {half_life}, want a finite number above 0")
    if minimum and (domain_history is None or domain_history.shape != (behaviors,)):
        raise ValueError("domain_minimum needs domain_history, one domain for each behavior")
    if min(minimum.values(), default=0) < 0 or sum(minimum.values()) > budget:
        raise ValueError(f"domain_minimum {dict(minimum)}: want counts from 0 up, together at most {budget}")
    if np.any(time_history[1:] < time_history[:-1]):
        place = int(np.argmax(time_history[1:] < time_history[:-1])) + 1
        raise ValueError(f"time_history descends at position {place}; sort the history by time first")
    start, end = np.maximum(visible_start, 0), np.minimum(visible_end, behaviors)
    nonempty = np.flatnonzero(end > start)
    late = nonempty[time_history[end[nonempty] - 1] > request_time[nonempty]]
    if late.size:
        raise ValueError(f"request {int(late[0])} would see a behavior newer than itself; lower visible_end")
    end = np.maximum(end, 0)
    node_history, node, lists = _index(levels_history, levels_candidate)
    queries, query = _distinct(lists, node, request_of_candidate, start, end, request_time)
    ranking = _newest(lists, node_history, queries, budget)
    if minimum and domain_history is not None:
        ranking = _with_minimum(ranking, lists, node_history, queries, domain_history, minimum)
    index = np.where(ranking < 0, -1, lists.position(ranking))
    level = np.maximum(ranking >> lists.bits, 0).astype(np.int8)
    decayed = _decayed_counts(lists, time_history, queries, half_life).astype(np.float32)
    return SearchResult(index[query], level[query], (queries.high - queries.low).T[query], decayed.T[query])


def _rank(known: Ints, ids: Ints) -> Ints:
    """Where each id stands in the ascending `known`; -1 for the others."""
    if not known.size:
        return np.full(ids.size, -1)
    largest = int(known[-1])
    if (
        largest < 4 * ids.size and known[0] >= 0 and ids.min(initial=0) >= 0
    ):  # small ids: one table look-up each beats a binary search
        table = np.full(largest + 2, -1)
        table[known] = np.arange(known.size)
        return table[np.minimum(ids, largest + 1)]
    place = np.minimum(np.searchsorted(known, ids), known.size - 1)
    return np.where(known[place] == ids, place, -1)


def _index(levels_history: Ints, levels_candidate: Ints) -> tuple[Ints, Ints, _Lists]:
    """Number the candidates' taxonomy nodes, and list the behaviors of each.

    Nodes are numbered from the candidates: a behavior on no candidate's path drops out at that level, which
    keeps the deep lists short. Returns node of behavior [m, N], node of candidate [m, C] and the lists.
    """
    node_history = np.full(levels_history.shape, _NO_NODE_BEHAVIOR)
    node_candidate = np.full(levels_candidate.shape, _NO_NODE_CANDIDATE)
    bits = levels_history.shape[1].bit_length()
    at, candidate = np.arange(levels_history.shape[1]), np.arange(levels_candidate.shape[1])
    parent, candidate_parent = np.zeros_like(at), np.zeros_like(candidate)
    numbered, keys = 0, []
    for level, (ids, candidate_ids) in enumerate(zip(levels_history, levels_candidate, strict=True)):
        known_here = candidate_ids[candidate] != 0  # hashes may be negative
        candidate, candidate_parent = candidate[known_here], candidate_parent[known_here]
        known, candidate_digit = np.unique(candidate_ids[candidate], return_inverse=True)
        child = candidate_parent * known.size + candidate_digit
        path, candidate_parent = np.unique(child, return_inverse=True)
        digit = _rank(known, ids[at])
        at, parent, digit = at[digit >= 0], parent[digit >= 0], digit[digit >= 0]
        place = _rank(path, parent * known.size + digit)
        at, parent = at[place >= 0], place[place >= 0]
        node_history[level, at] = numbered + parent
        node_candidate[level, candidate] = numbered + candidate_parent
        # numpy sorts 16-bit integers stably by radix, several times faster than wide ones
        order = np.argsort(parent.astype(np.uint16) if path.size <= 1 << 16 else parent, kind="stable")
        keys.append((((numbered + parent) << bits) + at)[order])
        numbered += path.size
    return node_history, node_candidate, _Lists(np.concatenate(keys), bits)


def _distinct(
    lists: _Lists, node: Ints, request: Ints, start: Ints, end: Ints, request_time: Ints
) -> tuple[_Queries, Ints]:
    """One query for all candidates that must get the same answer, and the query of each candidate [C].

    They agree in the request and the deepest node with a visible behavior: its ancestors follow from it, and
    deeper nodes are empty, so nothing else decides. node is int64 [m, C].
    """
    low, high = lists.ranges(node, start[request], end[request])
    depth = np.count_nonzero(high > low, axis=0)  # an ancestor of a node with matches has matches
    deepest = np.where(depth > 0, node[depth - 1, np.arange(request.size)], -1)
    many = int(node.max(initial=0)) + 2
    _, first, query = np.unique(request * many + deepest + 1, return_index=True, return_inverse=True)
    of = request[first]
    path, low, high = node[:, first], low[:, first], high[:, first]
    return _Queries(path, low, high, start[of], end[of], request_time[of]), query


def _newest(lists: _Lists, node_history: Ints, queries: _Queries, budget: int) -> Ints:
    """The best `budget` behaviors of each query.

    Returns int64 [Q, K] of (level << bits) + position, in which descending order is the order wanted
    (deepest, then newest); -1 where there are fewer.
    """
    low, high = queries.low, queries.high
    ranking = np.full((queries.start.size, budget), -1)
    taken = np.zeros(queries.start.size, dtype=np.int64)
    for level in reversed(range(low.shape[0])):
        length = np.where(taken < budget, np.minimum(high[level] - low[level], budget), 0)
        stop = np.cumsum(length)
        owner = np.repeat(np.arange(taken.size), length)
        entry = np.repeat(high[level] - 1 + stop - length, length) - np.arange(owner.size)
        position = lists.position(lists.key[entry])
        fresh = np.ones(owner.size, dtype=np.bool_)
        if level + 1 < low.shape[0]:
            fresh = node_history[level + 1, position] != queries.node[level + 1, owner]
            owner, position = owner[fresh], position[fresh]
        before = np.concatenate([[0], np.cumsum(fresh)])[stop - length]
        slot = np.arange(owner.size) + (taken - before)[owner]
        fits = slot < budget
        ranking[owner[fits], slot[fits]] = ((level + 1) << lists.bits) + position[fits]
        taken += np.bincount(owner[fits], minlength=taken.size)
    return ranking


def _with_minimum(
    ranking: Ints,
    lists: _Lists,
    node_history: Ints,
    queries: _Queries,
    domain: Ints,
    least_of: Mapping[int, int],
) -> Ints:
    """Give the best few of each named domain their place; the general order `ranking` [Q, K] fills the rest.

    The general order never runs out: of its K entries, at most as many are guaranteed a place as there are
    guaranteed places.
    """
    domain_of = np.append(domain, 0)[np.where(ranking < 0, -1, lists.position(ranking))]
    guaranteed = np.zeros(ranking.shape, dtype=np.bool_)
    room = np.full(ranking.shape[0], ranking.shape[1])
    extra = []
    for name, least in least_of.items():
        own = _Lists(lists.key[domain[lists.position(lists.key)] == name], lists.bits)
        low, high = own.ranges(queries.node, queries.start, queries.end)
        best = _newest(own, node_history, replace(queries, low=low, high=high), least)
        here = (domain_of == name) & (ranking >= 0)
        rank = np.cumsum(here, axis=1)
        guaranteed |= here & (rank <= least)
        room -= np.count_nonzero(best >= 0, axis=1)
        # the general order begins with the same ones: add those that it was too short for
        extra.append(np.where(np.arange(least) < rank[:, -1:], -1, best))
    others = (ranking >= 0) & ~guaranteed
    kept = guaranteed | (others & (np.cumsum(others, axis=1) <= room[:, None]))
    merged = np.concatenate([np.where(kept, ranking, -1), *extra], axis=1)
    return -np.sort(-merged, axis=1)[:, : ranking.shape[1]]


def _decayed_counts(lists: _Lists, time: Ints, queries: _Queries, half_life: float) -> Floats:
    """Sum of 2 ** (-age / half_life) over the visible matches: [m, Q].

    Plain prefix sums of exponentials overflow or lose old behaviors, and what other lists add before them
    drowns small ones. So each list keeps its own running sum, seen from the time of the entry it stands at,
    with a relative error below 2 N eps. A range is the sum at its end less the sum before its start, both
    seen from the request. As weights rise within a list, the sum taken off is at most s times what remains
    if s entries stand before the range for each one in it: the error stays below 4 N eps (1 + s). At N =
    100,000 that is 1e-10 where nothing stands before, and below 1e-5 at the very worst.
    """
    low, high = queries.low, queries.high
    if not lists.key.size:
        return np.zeros(low.shape)
    node, when = lists.key >> lists.bits, time[lists.position(lists.key)]
    decay = np.zeros(when.size)  # 0 at the head of a list: nothing is carried over
    same = node[1:] == node[:-1]
    decay[1:] = np.where(same, np.exp2(-np.where(same, np.diff(when), 0) / half_life), 0.0)
    sums = _running_sums(decay)

    def sum_until(entry: Ints) -> Floats:
        # An empty range may look at newer entries: a negative age would overflow.
        weighted: Floats = sums[entry] * np.exp2(-np.maximum(queries.time - when[entry], 0) / half_life)
        return weighted

    last, before = np.maximum(high - 1, 0), np.maximum(low - 1, 0)
    head = (low == 0) | (node[before] != node[last])
    total = sum_until(last) - np.where(head, 0.0, sum_until(before))
    return np.where(high > low, total, 0.0)


def _running_sums(decay: Floats) -> Floats:
    """s[i] = 1 + decay[i] * s[i - 1] for float64 [P], P >= 1, in 2 sqrt(P) steps of Python instead of P.

    The recurrence runs down sqrt(P) columns at once, then what each column hands to the next is added.
    """
    steps = int(np.ceil(np.sqrt(decay.size)))
    columns = -(-decay.size // steps)
    factor = np.zeros((columns, steps))
    factor.ravel()[: decay.size] = decay
    factor = np.ascontiguousarray(factor.T)
    sums = np.ones_like(factor)
    for step in range(1, steps):
        sums[step] += factor[step] * sums[step - 1]
    np.multiply.accumulate(factor, axis=0, out=factor)
    carry = np.zeros(columns)
    for column in range(1, columns):
        carry[column] = sums[-1, column - 1] + factor[-1, column - 1] * carry[column - 1]
    running: Floats = (sums + factor * carry).T.ravel()
    return running[: decay.size]
