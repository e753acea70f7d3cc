"""Batches with raw ids become batches with rows of the tables, for features whose ids come and go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.ids.bucket_map import Sightings
from embeddings.ids.rules import IdRules
from embeddings.lookup.jagged import OneIdBags
from trainer.data.batch import RequestBatch
from trainer.log.schema import FeatureInfo

Int64s = npt.NDArray[np.int64]
Prepare = Callable[[RequestBatch], RequestBatch]
# An id's time where nothing says when it was seen.
_EVER = np.iinfo(np.int64).min


class Finder(Protocol):
    """What knows the rows of ids that do not change."""

    @property
    def rules(self) -> IdRules: ...

    def look_up(self, wanted: Int64s) -> Int64s: ...


@dataclass(frozen=True)
class SeenIds:
    """The raw ids of one feature in a batch.

    Attributes:
        sightings: each id once; place: of each id of the batch among them.
    """

    sightings: Sightings
    place: Int64s


def rules_for(rules: Mapping[str, IdRules], features: Mapping[str, FeatureInfo]) -> dict[str, IdRules]:
    """The same rules, where a feature that candidates do not have counts all sightings.

    The log says so and no batch: all candidates of a rank may have empty lists of ids.

    Args:
        rules: name of a map -> its rules; features: of the log.
    """

    def alone(feature: str) -> bool:
        return feature in features and not features[feature].of_candidates

    return {
        name: replace(each, counts="all") if alone(each.within or name) else each
        for name, each in rules.items()
    }


def seen_ids(batch: RequestBatch, rules: Mapping[str, IdRules], counted: bool = True) -> dict[str, SeenIds]:
    """The raw ids of each feature in a batch, with how often and when they were seen.

    A behavior's id is seen at the behavior's time, that of a candidate or of a request at the request's.

    Args:
        rules: those of a feature that candidates do not have count all sightings, see `rules_for`.
        counted: False where the batch repeats one of another rank: then nothing is a sighting.
    """
    behaviors, request_time = batch.behavior_time.numpy(), batch.request_time.numpy()
    times = np.concatenate([behaviors, request_time[batch.candidate_request.numpy()]])
    of_candidates = np.arange(times.size) >= behaviors.size
    found = {}
    for kjt in _parts(batch):
        bag_times = times if kjt is batch.features else request_time
        for name, part in _segments(kjt):
            if name not in rules:
                continue
            ids, lengths = kjt.values()[part].numpy(), _lengths(kjt, name)
            counts = np.ones(bag_times.size, dtype=np.int64)
            if kjt is batch.features and rules[name].counts == "candidates":
                counts = of_candidates.astype(np.int64)
            newest = bag_times
            if not (lengths == 1).all():
                counts, newest = np.repeat(counts, lengths), np.repeat(bag_times, lengths)
            if not counted:
                counts, newest = np.zeros_like(counts), np.full_like(newest, _EVER)
            found[name] = _distinct(ids, counts, newest)
    nothing = np.zeros(0, dtype=np.int64)
    return {
        name: found.get(name) or _distinct(nothing, nothing, nothing)
        for name, each in rules.items()
        if not each.within
    }


def with_rows(batch: RequestBatch, rows: Mapping[str, Int64s]) -> RequestBatch:
    """The same batch with rows in the place of ids.

    Args:
        rows: of each feature, for each id of the batch. What a map within another one gives
            (`IdRules.within`) is called `<feature>@<group>`, and becomes a key of its own.
    """
    features = _replaced(batch.features, rows)
    context = None if batch.context is None else _replaced(batch.context, rows)
    return replace(batch, features=features, context=context)


def looked_up(batch: RequestBatch, finders: Mapping[str, Finder]) -> RequestBatch:
    """The same batch with rows by maps that do not change."""
    if not finders:
        return batch
    rows = {}
    for kjt in _parts(batch):
        for name, part in _segments(kjt):
            for map_name, finder in finders.items():
                if name in (map_name, finder.rules.within):
                    rows[map_name] = finder.look_up(kjt.values()[part].numpy())
    return with_rows(batch, rows)


def looking_up(finders: Mapping[str, Finder] | None, last: Prepare | None) -> Prepare | None:
    """What a reader does to its batches: ids become rows by maps that do not change, then comes `last`.

    The ids of the candidates' items stay in `RequestBatch.items`. None where there is nothing to do.
    """
    if not finders:
        return last

    def prepare(batch: RequestBatch) -> RequestBatch:
        found = replace(looked_up(batch, finders), items=batch.candidate_items)
        return found if last is None else last(found)

    return prepare


def newest_request(batch: RequestBatch) -> int:
    """Seconds."""
    return int(batch.request_time.max()) if batch.requests else _EVER


def _distinct(ids: Int64s, counts: Int64s, newest: Int64s) -> SeenIds:
    # A hash table instead of a sort: four times as fast as numpy's unique.
    coded = pa.array(ids).dictionary_encode()
    distinct, place = coded.dictionary.to_numpy(), coded.indices.to_numpy().astype(np.int64)
    total = np.bincount(place, counts, distinct.size).astype(np.int64)
    last = np.full(distinct.size, _EVER)
    np.maximum.at(last, place, newest)
    return SeenIds(Sightings(distinct, total, last), place)


def _parts(batch: RequestBatch) -> Iterator[KeyedJaggedTensor]:
    yield batch.features
    if batch.context is not None:
        yield batch.context


def _segments(kjt: KeyedJaggedTensor) -> Iterator[tuple[str, slice]]:
    """Each key, and where its ids stand among the values."""
    begin = 0
    for key, length in zip(kjt.keys(), kjt.length_per_key(), strict=True):
        yield key, slice(begin, begin + length)
        begin += length


def _lengths(kjt: KeyedJaggedTensor, name: str) -> npt.NDArray[np.int32]:
    """Ids of each bag of a feature."""
    lengths: npt.NDArray[np.int32] = kjt.lengths().view(len(kjt.keys()), -1)[kjt.keys().index(name)].numpy()
    return lengths


def _replaced(kjt: KeyedJaggedTensor, rows: Mapping[str, Int64s]) -> KeyedJaggedTensor:
    keys: list[str] = kjt.keys()
    parts = {
        name: feature for name in rows if name not in keys and (feature := name.rpartition("@")[0]) in keys
    }
    if not parts and not any(key in rows for key in keys):
        return kjt
    if isinstance(kjt, OneIdBags):
        columns = [torch.from_numpy(rows[name]) if name in rows else kjt[name].values() for name in keys]
        columns += [torch.from_numpy(rows[name]) for name in parts]
        return OneIdBags([*keys, *parts], torch.stack(columns))
    values = kjt.values().clone()
    places = dict(_segments(kjt))
    for name in keys:
        if name in rows:
            values[places[name]] = torch.from_numpy(rows[name])
    lengths = kjt.lengths().view(len(keys), -1)
    return KeyedJaggedTensor(
        keys=[*keys, *parts],
        values=torch.cat([values, *(torch.from_numpy(rows[name]) for name in parts)]),
        lengths=torch.cat([lengths, *(lengths[keys.index(name)][None] for name in parts.values())]).flatten(),
        stride=kjt.stride(),
        length_per_key=[*kjt.length_per_key(), *(rows[name].size for name in parts)],
    )
