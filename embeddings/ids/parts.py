"""The state of a map, cut by buckets for one number of ranks, joined and cut again for another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embeddings.ids.bucket_map import ADMISSION, BucketMap
from embeddings.ids.frozen import FrozenIds
from embeddings.ids.hashing import hashed
from embeddings.ids.rules import IdRules

State = dict[str, npt.NDArray[Any]]
# Where an admission's state has this array, all its arrays have an entry an id. All other arrays of a state
# have the same number of entries for each bucket, bucket after bucket.
_IDS = ADMISSION + "ids"


@dataclass(frozen=True)
class MapPart:
    """What `BucketMap.state` gave of some buckets.

    Attributes:
        state: its arrays may be memory-mapped. Only what is asked for is read.
    """

    buckets: range
    state: State


def part_for(buckets: range, parts: Sequence[MapPart], rules: IdRules, before: IdRules) -> State:
    """The state of some buckets, for `BucketMap.load`, from parts that hold all of them.

    Where admission keeps another kind of state now, its state is left out and begins anew.

    Args:
        parts: of all buckets, each in one part; rules: of the feature now; before: when `parts` were made,
            with the same buckets and ways.

    Raises:
        ValueError: buckets are missing, or stand in two parts.
    """
    found = [part for part in parts if _overlap(part.buckets, buckets)]
    if sum(len(_overlap(part.buckets, buckets)) for part in found) != len(buckets):
        raise ValueError(f"of buckets {buckets.start} to {buckets.stop - 1}, some are missing or there twice")
    found = sorted(found, key=lambda part: part.buckets.start)
    names = [name for name in parts[0].state if not name.startswith(ADMISSION)]
    of_admission = [name for name in parts[0].state if name.startswith(ADMISSION)]
    if rules.admission_state == before.admission_state and _IDS in of_admission:
        ids = _by_id(buckets, found, rules, of_admission)
        return _by_bucket(buckets, found, names, parts[0]) | ids
    if rules.admission_state == before.admission_state:
        names += of_admission
    return _by_bucket(buckets, found, names, parts[0])


def frozen(parts: Sequence[MapPart], rules: IdRules) -> FrozenIds:
    """All ids that have a row, from parts that hold all buckets."""
    ids, rows = [], []
    for part in parts:
        own = BucketMap.entries_of(part.state, part.buckets, rules)
        ids.append(own[0])
        rows.append(own[1])
    every = np.concatenate(ids)
    order = np.argsort(every, kind="stable")
    return FrozenIds(rules, every[order], np.concatenate(rows)[order])


def _by_bucket(buckets: range, parts: Sequence[MapPart], names: Sequence[str], any_part: MapPart) -> State:
    return {
        name: np.concatenate([any_part.state[name][:0], *_pieces(buckets, parts, name)]) for name in names
    }


def _pieces(buckets: range, parts: Sequence[MapPart], name: str) -> Iterator[npt.NDArray[Any]]:
    for part in parts:
        array, here = part.state[name], _overlap(part.buckets, buckets)
        entries = len(array) // len(part.buckets)
        begin = here.start - part.buckets.start
        yield array[begin * entries : (begin + len(here)) * entries]


def _by_id(buckets: range, parts: Sequence[MapPart], rules: IdRules, names: Sequence[str]) -> State:
    """Arrays with an entry an id, ascending."""
    columns: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}
    for part in parts:
        bucket = rules.bucket(hashed(part.state[_IDS]))
        here = (bucket >= buckets.start) & (bucket < buckets.stop)
        for name, pieces in columns.items():
            pieces.append(part.state[name][here])
    if not parts:
        return {}
    joined = {name: np.concatenate(pieces) for name, pieces in columns.items()}
    order = np.argsort(joined[_IDS], kind="stable")
    return {name: array[order] for name, array in joined.items()}


def _overlap(one: range, other: range) -> range:
    start = max(one.start, other.start)
    return range(start, max(start, min(one.stop, other.stop)))
