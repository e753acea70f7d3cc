"""Mean labels of the training split by user and by item, for candidates of another split."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embeddings.errors import DataError
from trainer.config.sections import DataConfig
from trainer.data.files import READERS, RowGroup, ahead, check_files
from trainer.data.labels import TaskLabels
from trainer.data.row_group import GroupColumns, read_footer, read_group
from trainer.log.schema import LogManifest
from trainer.quality.ranking import Floats, Ints

# Every user and item gets so many candidates with the mean label besides their own.
STRENGTH = 10.0


@dataclass(frozen=True)
class LabelRates:
    """Mean labels of T tasks, for n candidates of another split.

    Attributes:
        overall: [T], NaN where training has no label of a task; by_user, by_item: [n, T], drawn towards
            `overall` (by_item is that where a log has no items).
        positives: [n, T], the labels of the candidate's user, summed.
    """

    overall: Floats
    by_user: Floats
    by_item: Floats
    positives: Floats

    @property
    def by_both(self) -> Floats:
        """What user and item each add to the log-odds of the mean, together, as a probability."""
        odds = _log_odds(self.by_user) + _log_odds(self.by_item) - _log_odds(self.overall)
        rates: Floats = 1 / (1 + np.exp(-odds))
        return rates


@dataclass(frozen=True)
class RateTable:
    """Label rates by user and by item, of which those of any candidates are made.

    Attributes:
        overall: as of `LabelRates`; of_users, of_items: the sums of training; no items where candidates have
            none.
    """

    overall: Floats
    of_users: _Sums
    of_items: _Sums | None

    @property
    def any_positive(self) -> bool:
        """Whether training has a positive of any of the users."""
        return bool(self.of_users.labels.any())

    def of(self, users: Ints, items: Ints | None) -> LabelRates:
        """Rates of candidates, [n], whose users and items are among those asked for."""
        user = self.of_users.places(users)
        by_user = self.of_users.rates(self.overall)[user]
        by_item = np.broadcast_to(self.overall, by_user.shape)
        if self.of_items is not None and items is not None:
            by_item = self.of_items.rates(self.overall)[self.of_items.places(items)]
        return LabelRates(self.overall, by_user, by_item, self.of_users.labels[user])


def rate_table(
    config: DataConfig, manifest: LogManifest, labels: TaskLabels, users: Ints, items: Ints | None
) -> RateTable:
    """Rates of the training split for these users and items; one pass over it.

    Memory follows the users and items asked for, whatever the size of the training split. Row groups are read
    by several threads and added up in their order, so that sums round alike on any machine.

    Args:
        labels: of the tasks; users, items: ids; None where candidates have no items.

    Raises:
        DataError: the training split is empty, missing or malformed.
    """
    tasks = len(labels.tasks)
    of_users, of_items = _Sums(users, tasks), None if items is None else _Sums(items, tasks)
    total, count, candidates = np.zeros(tasks), np.zeros(tasks), 0
    read = {f"label_{name}": name for name in labels.labels}
    names = ["user_id", "num_candidates", *([] if items is None else ["candidate_item_id"]), *read]
    footer = lru_cache(READERS)(read_footer)

    def decoded(place: RowGroup) -> tuple[Ints, Ints | None, npt.NDArray[np.float32]] | None:
        """Users, items and labels of the candidates of a row group."""
        try:
            group = read_group(place.file, place.row_group, names, footer(place.file))
            user = np.repeat(group.ints("user_id"), group.ints("num_candidates"))
            found = {
                label: group.labels(_of_candidates(group, name, user.size), name, label in labels.partial)
                for name, label in read.items()
            }
            label = labels.of_tasks(found, user.size)
            item = None
            if items is not None:
                name = "candidate_item_id"
                item = group.flat(_of_candidates(group, name, user.size), name, np.int64)
        except DataError:
            # Training left it out too, and named it.
            if config.on_bad != "skip":
                raise
            return None
        return user, item, label

    for user, item, label in ahead(decoded, check_files(config.log, manifest, "train", None)):
        total += np.nansum(label, axis=0, dtype=np.float64)
        count += (~np.isnan(label)).sum(axis=0)
        candidates += label.shape[0]
        of_users.add(user, label)
        if of_items is not None and item is not None:
            of_items.add(item, label)
    if not candidates:
        raise DataError("the training split has no candidates", file=config.log)
    overall = np.divide(total, count, out=np.full(tasks, np.nan), where=count > 0)
    return RateTable(overall, of_users, of_items)


def _log_odds(rate: Floats) -> Floats:
    """Finite for a label that training never saw, or saw always."""
    p = np.clip(rate, 1e-7, 1 - 1e-7)
    odds: Floats = np.log(p) - np.log1p(-p)
    return odds


class _Sums:
    """Labels summed by key and task, of the wanted keys; a label that is NaN was not observed."""

    def __init__(self, wanted: Ints, tasks: int) -> None:
        self.keys = np.unique(wanted)
        self.labels, self.counts = np.zeros((self.keys.size, tasks)), np.zeros((self.keys.size, tasks))

    def add(self, keys: Ints, labels: npt.NDArray[np.float32]) -> None:
        if not self.keys.size:
            return
        at = np.searchsorted(self.keys, keys).clip(max=self.keys.size - 1)
        known = self.keys[at] == keys
        # Of the keys that are here alone: there may be millions of others.
        here, at = np.unique(at[known], return_inverse=True)
        labels = labels[known]
        observed = ~np.isnan(labels)
        for task in range(labels.shape[1]):
            self.labels[here, task] += np.bincount(at, np.nan_to_num(labels[:, task]), here.size)
            self.counts[here, task] += np.bincount(at, observed[:, task], here.size)

    def places(self, keys: Ints) -> Ints:
        """Where each of some wanted keys is in the arrays."""
        places: Ints = np.searchsorted(self.keys, keys)
        return places

    def rates(self, overall: Floats) -> Floats:
        """[keys, tasks], smoothed."""
        smoothed: Floats = (self.labels + STRENGTH * overall) / (self.counts + STRENGTH)
        return smoothed


def _of_candidates(group: GroupColumns, name: str, count: int) -> pa.Array:
    """A column of candidates, flattened."""
    _, requests = group.lists(name)
    _, values = group.unnest(requests, name)
    if len(values) != count:
        raise group.fail(f"has {len(values)} values for {count} candidates", name)
    return values
