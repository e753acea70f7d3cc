"""How often and when training has seen each id of a feature: one pass over the columns of that feature.

A behavior counts once for each row of the log that holds it, however many requests of that row see it, since
training looks it up once a block; one that lies outside of all their windows does not count. Candidates and
features of requests count once each, at the time of the request. A hard search that is done while reading
(`data.search`) may leave out some of what counts here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from embeddings.errors import DataError
from trainer.config.sections import DataConfig
from trainer.data.blocks import with_windows
from trainer.data.files import READERS, RowGroup, ahead, check_files
from trainer.data.labels import TaskLabels
from trainer.data.row_group import read_footer
from trainer.data.rows import Columns, UserRows, read_rows
from trainer.data.sample import Sample
from trainer.log.bags import Bags
from trainer.log.schema import FeatureInfo, LogManifest, SplitInfo
from trainer.quality.ranking import Bools, Ints

NEVER = np.iinfo(np.int64).min
# Ids that are counted at a time: adding them up costs a pass over the whole table.
_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Lookups:
    """What training has seen of the ids of one feature.

    Attributes:
        count: [rows], how often each was seen; last: [rows], when last, unix seconds, `NEVER` = never.
        newest: time of the newest request that was read.
        read: the share of the split's row groups that was read; 1 = all, and only then is an id without a
            sighting one that was never seen.
    """

    count: Ints
    last: Ints
    newest: int
    read: float

    @property
    def complete(self) -> bool:
        return self.read == 1


def lookups_of(
    config: DataConfig, manifest: LogManifest, feature: str, rows: int, most: int, split: str = "train"
) -> Lookups:
    """Read one feature of a split.

    Memory: 16 bytes a row of the table, and 64 MiB.

    Args:
        feature: of behaviors, candidates or requests, with dense ids; rows: of its tables.
        most: about so many ids are read at most, of row groups that are drawn by a hash of their places, the
            same each time.

    Raises:
        DataError: the split is missing, malformed or empty, or an id lies outside the table.
    """
    places = check_files(config.log, manifest, split, None)
    info = (manifest.features | manifest.context)[feature]
    sample = Sample.of(_size(manifest.splits[split], info, feature in manifest.context), len(places), most)
    if sample is not None:
        whole = len(places)
        # Whole row groups: here nobody needs whole users of many.
        drawn = max(1, round(sample.users * sample.row_groups))
        places = replace(sample, row_groups=drawn).places(places)
    read = 1.0 if sample is None else len(places) / whole
    count, last, newest = np.zeros(rows, dtype=np.int64), np.full(rows, NEVER), NEVER
    waiting, held = list[tuple[Ints, Ints]](), 0
    for ids, times, latest in _sightings(config, manifest, feature, rows, places):
        newest = max(newest, latest)
        waiting.append((ids, times))
        held += ids.size
        if held >= _AT_ONCE:
            _add(count, last, waiting)
            held = 0
    _add(count, last, waiting)
    return Lookups(count, last, newest, read)


def _size(split: SplitInfo, info: FeatureInfo, of_requests: bool) -> int:
    """About how many ids a split has of a feature, one a bag."""
    if of_requests:
        return split.requests
    return split.behaviors * info.of_behaviors + split.candidates * info.of_candidates


def _add(count: Ints, last: Ints, waiting: list[tuple[Ints, Ints]]) -> None:
    if not waiting:
        return
    ids, times = (np.concatenate(part) for part in zip(*waiting, strict=True))
    waiting.clear()
    count += np.bincount(ids, minlength=count.size)
    np.maximum.at(last, ids, times)


def _sightings(
    config: DataConfig, manifest: LogManifest, feature: str, rows: int, places: list[RowGroup]
) -> Iterator[tuple[Ints, Ints, int]]:
    """Ids with their times, and the newest request, of each row group."""
    columns = replace(
        Columns.of(manifest, {feature: rows}), labels=TaskLabels.of(manifest, ()), numeric=(), weighted=False
    )
    footer = lru_cache(READERS)(read_footer)

    def decoded(place: RowGroup) -> tuple[Ints, Ints, int] | None:
        try:
            found = read_rows(place.file, place.row_group, columns, footer(place.file))
        except DataError:
            # Training left it out too, and named it.
            if config.on_bad != "skip":
                raise
            return None
        ids, times = _of_rows(found, feature, config)
        return ids, times, int(found.request_time.max(initial=NEVER))

    yield from ahead(decoded, places)


def _of_rows(rows: UserRows, feature: str, config: DataConfig) -> tuple[Ints, Ints]:
    """All ids of a feature in a row group, and when each was seen."""
    ids, times = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]

    def add(bags: Bags, time: Ints, kept: Bools) -> None:
        lengths = np.ones(time.size, dtype=np.int64) if bags.offsets is None else np.diff(bags.offsets)
        chosen = np.repeat(kept, lengths)
        ids.append(bags.values[chosen].astype(np.int64))
        times.append(np.repeat(time, lengths)[chosen])

    if feature in rows.history:
        add(rows.history[feature], rows.history_time, _visible(rows, config))
    of_request = np.repeat(rows.request_time, np.diff(rows.candidate_offsets))
    for part, time in ((rows.candidates, of_request), (rows.context, rows.request_time)):
        if feature in part:
            add(part[feature], time, np.ones(time.size, dtype=np.bool_))
    return np.concatenate(ids), np.concatenate(times)


def _visible(rows: UserRows, config: DataConfig) -> Bools:
    """[behaviors], whether the window of some request of the row holds the behavior."""
    *_, start, end, _, _ = with_windows(rows, config.history_length, config.ingestion_delay).requests
    borders = np.zeros(int(rows.history_offsets[-1]) + 1, dtype=np.int64)
    np.add.at(borders, start, 1)
    np.add.at(borders, end, -1)
    visible: Bools = np.cumsum(borders[:-1]) > 0
    return visible
