"""What a log knows of scored candidates that their scores do not say.

Files of scores name a candidate by its user, request and place. How old the newest behavior of the request
was, and how often training has seen the item, are read from the log again: only the columns needed, a row
group at a time, and only of row groups that may hold one of the users.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pyarrow.parquet as pq

from embeddings.errors import DataError
from trainer.config.sections import DataConfig
from trainer.data.blocks import with_windows
from trainer.data.files import READERS, RowGroup, ahead, check_files
from trainer.data.labels import TaskLabels
from trainer.data.row_group import read_footer, read_group
from trainer.data.rows import Columns, read_rows
from trainer.log.schema import LogManifest
from trainer.quality.ranking import Floats, Ints

# Of a training split with more candidates nobody counts the items.
_MOST = 100_000_000


def behavior_ages(
    config: DataConfig, manifest: LogManifest, split: str, users: Ints, requests: Ints
) -> Floats:
    """[n], seconds from the newest behavior that a request may see to the request.

    NaN where the request sees no behavior, or the log has no such request.

    Args:
        users, requests: [n], names of the candidates' requests.

    Raises:
        DataError: the split is missing or malformed.
    """
    wanted = np.unique(users)
    parts = list(_ages(config, manifest, split, wanted))
    if not parts:
        return np.full(users.size, np.nan)
    user, request, age = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.lexsort((request, user))
    # One number a request: its place among all that are known or asked for.
    names = np.stack([np.r_[user, users], np.r_[request, requests]])
    _, number = np.unique(names, axis=1, return_inverse=True)
    known, asked = np.split(number.reshape(-1), [user.size])
    at = np.searchsorted(known[order], asked).clip(max=user.size - 1)
    found: Floats = np.where(known[order][at] == asked, age[order][at], np.nan)
    return found


def _ages(
    config: DataConfig, manifest: LogManifest, split: str, wanted: Ints
) -> Iterator[tuple[Ints, Ints, Floats]]:
    """Users, requests and ages, a row group at a time, of the wanted users (ascending)."""
    columns = replace(
        Columns.of(manifest, {}), labels=TaskLabels.of(manifest, ()), numeric=(), weighted=False
    )
    footer = lru_cache(READERS)(read_footer)

    def decoded(place: RowGroup) -> tuple[Ints, Ints, Floats] | None:
        try:
            if not _may_hold(footer(place.file), place.row_group, wanted):
                return None
            rows = read_rows(place.file, place.row_group, columns, footer(place.file))
        except DataError:
            # Scoring left it out too, and named it.
            if config.on_bad != "skip":
                raise
            return None
        # Windows of the newest behavior alone.
        user, request, time, start, end, *_ = with_windows(rows, 1, config.ingestion_delay).requests
        age, sees = np.full(user.size, np.nan), end > start
        age[sees] = time[sees] - rows.history_time[end[sees] - 1]
        kept = np.isin(user, wanted)
        return user[kept], request[kept], age[kept]

    yield from ahead(decoded, check_files(config.log, manifest, split, None))


def _may_hold(footer: pq.FileMetaData, row_group: int, users: Ints) -> bool:
    """Whether a row group may hold one of some users (ascending), by the statistics of its column."""
    group = footer.row_group(row_group)
    for column in map(group.column, range(group.num_columns)):
        if column.path_in_schema == "user_id" and column.is_stats_set and column.statistics.has_min_max:
            least, most = column.statistics.min, column.statistics.max
            return bool(np.searchsorted(users, least) < np.searchsorted(users, most, side="right"))
    return True


def item_frequency(config: DataConfig, manifest: LogManifest, items: Ints) -> Ints:
    """[n], how often each item is a candidate of the training split.

    Args:
        items: [n], ids as the log has them.

    Raises:
        DataError: the training split is missing, malformed, or has more than 100 million candidates.
    """
    size = manifest.splits["train"].candidates if manifest.holds("train") else 0
    if size > _MOST:
        raise DataError(f"training has {size:,} candidates, and items are counted in up to {_MOST:,}")
    keys = np.unique(items)
    counts = np.zeros(keys.size, dtype=np.int64)
    name, footer = "candidate_item_id", lru_cache(READERS)(read_footer)

    def decoded(place: RowGroup) -> Ints | None:
        try:
            group = read_group(place.file, place.row_group, [name], footer(place.file))
            _, requests = group.lists(name)
            _, values = group.unnest(requests, name)
            return group.flat(values, name, np.int64)
        except DataError:
            if config.on_bad != "skip":
                raise
            return None

    for found in ahead(decoded, check_files(config.log, manifest, "train", None)):
        if keys.size:
            at = np.searchsorted(keys, found).clip(max=keys.size - 1)
            counts += np.bincount(at[keys[at] == found], minlength=keys.size)
    frequency: Ints = counts[np.searchsorted(keys, items)]
    return frequency
