"""What asks an index: users or candidates of requests that it was not built from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from pipelines.vectors.items import ItemColumns
from pipelines.vectors.users import UserSource
from trainer.data.files import RowGroup, check_files
from trainer.data.rows import read_rows
from trainer.log.bags import Bags, Ints
from trainer.log.schema import LogManifest
from trainer.snapshot.retrieval.item_batch import item_batch
from trainer.snapshot.retrieval.recall import Queries
from trainer.snapshot.retrieval.spaces.space import Space
from trainer.snapshot.retrieval.vector_files import Floats

_NONE: Floats = np.zeros((0, 1), dtype=np.float32)
# Row groups that queries come from, if there are as many.
_PLACES = 16
# Group -> the rows of its items.
Stretches = Mapping[int, slice]


def _some_places(places: Sequence[RowGroup], rng: np.random.Generator) -> list[RowGroup]:
    """All row groups in a random order."""
    return [places[at] for at in rng.permutation(len(places)).tolist()]


def _taken(parts: Iterator[Floats], wanted: int) -> Floats:
    """The first `wanted` rows of all parts together."""
    found: list[Floats] = []
    for part in parts:
        found.append(part[: wanted - sum(map(len, found))])
        if sum(map(len, found)) >= wanted:
            break
    return np.concatenate(found) if found else _NONE


def user_queries(source: UserSource, stretches: Stretches, rows: int, wanted: int, seed: int) -> Queries:
    """Users, each in the group of the first candidate of their last request, among the rows of that group.

    Users whose group has no item ask for nothing, and are left out.
    """
    rng = np.random.default_rng(seed)
    vectors: list[Floats] = []
    within: list[Ints] = []
    each = -(-wanted // min(max(len(source.places), 1), _PLACES))
    for place in _some_places(source.places, rng):
        left = min(each, wanted - sum(map(len, vectors)))
        for users in source.stream([place]):
            grouped = bool(source.space.group_feature)
            found = [stretches.get(group) for group in users.group.tolist()] if grouped else []
            parts = found or [slice(0, rows)] * len(users.user)
            chosen = [at for at, part in enumerate(parts) if part is not None][: max(left, 0)]
            group = users.group if grouped else np.zeros_like(users.group)
            vectors.append(users.vector[chosen, group[chosen]])
            bounds = [(part.start, part.stop) for at in chosen if (part := parts[at]) is not None]
            within.append(np.array(bounds, dtype=np.int64).reshape(-1, 2))
            left -= len(chosen)
            if left <= 0:
                break
    if not vectors:
        return Queries(_NONE, np.zeros((0, 2), dtype=np.int64))
    return Queries(np.concatenate(vectors)[:wanted], np.concatenate(within)[:wanted])


def candidate_queries(
    wanted_columns: ItemColumns, space: Space, log: Path, manifest: LogManifest, split: str, *draw: int
) -> Queries:
    """Candidates of requests of a split, drawn from several row groups, among all rows.

    Args:
        draw: rows of the output, queries that are wanted, and the seed.
    """
    rows, wanted, seed = draw
    rng = np.random.default_rng(seed)
    places = check_files(log, manifest, split, None)
    each = -(-wanted // min(len(places), _PLACES))

    def parts() -> Iterator[Floats]:
        for place in _some_places(places, rng):
            candidates = read_rows(place.file, place.row_group, wanted_columns.columns).candidates
            count = candidates[wanted_columns.item].size
            chosen = np.sort(rng.permutation(count)[:each])
            bags = {name: _picked(candidates[name], chosen) for name in wanted_columns.features}
            if chosen.size:
                yield space.queries(item_batch(space.snapshot, bags, chosen.size)).numpy()

    vectors = _taken(parts(), wanted)
    return Queries(vectors, np.tile(np.array([0, rows]), (len(vectors), 1)))


def _picked(bags: Bags, chosen: Ints) -> Bags:
    values, lengths = bags.select(chosen)
    return Bags.of_lengths(values.astype(np.int64), None if bags.offsets is None else lengths)
