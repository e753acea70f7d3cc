"""Mean labels of the training split, by user and by item: what a model without any history would know."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embeddings.errors import DataError
from trainer.config.sections import DataConfig
from trainer.data.files import RowGroup, check_files
from trainer.data.row_group import GroupColumns, read_group
from trainer.log.schema import LogManifest

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Every user and item gets so many candidates with the mean label besides their own.
STRENGTH = 10.0


@dataclass(frozen=True)
class LabelRates:
    """Mean labels of T tasks, for n candidates of another split.

    Attributes:
        overall: [T], NaN where training has no label of a task; by_user, by_item: [n, T], drawn towards
            `overall` (by_item is that where a log has no items).
    """

    overall: Floats
    by_user: Floats
    by_item: Floats

    @property
    def by_both(self) -> Floats:
        """What user and item each add to the log-odds of the mean, together, as a probability."""
        odds = _log_odds(self.by_user) + _log_odds(self.by_item) - _log_odds(self.overall)
        rates: Floats = 1 / (1 + np.exp(-odds))
        return rates


def label_rates(config: DataConfig, manifest: LogManifest, users: Ints, items: Ints | None) -> LabelRates:
    """Rates of the training split for candidates of these users and items; one pass over it.

    Memory follows the candidates asked for, whatever the size of the training split.

    Args:
        users: [n]; items: [n] ids, None where candidates have none.

    Raises:
        DataError: the training split is empty, missing or malformed.
    """
    tasks = len(manifest.tasks)
    of_users, of_items = _Sums(users, tasks), None if items is None else _Sums(items, tasks)
    total, count, candidates = np.zeros(tasks), np.zeros(tasks), 0
    for user, item, label in _candidates(config, manifest, items is not None):
        total += np.nansum(label, axis=0, dtype=np.float64)
        count += (~np.isnan(label)).sum(axis=0)
        candidates += label.shape[0]
        of_users.add(user, label)
        if of_items is not None and item is not None:
            of_items.add(item, label)
    if not candidates:
        raise DataError("the training split has no candidates", file=config.log)
    overall = np.divide(total, count, out=np.full(tasks, np.nan), where=count > 0)
    by_user = of_users.rates(overall)
    by_item = np.broadcast_to(overall, by_user.shape) if of_items is None else of_items.rates(overall)
    return LabelRates(overall, by_user, by_item)


def _log_odds(rate: Floats) -> Floats:
    """Finite for a label that training never saw, or saw always."""
    p = np.clip(rate, 1e-7, 1 - 1e-7)
    odds: Floats = np.log(p) - np.log1p(-p)
    return odds


class _Sums:
    """Labels summed by key and task, of the wanted keys; a label that is NaN was not observed."""

    def __init__(self, wanted: Ints, tasks: int) -> None:
        self.keys, self.place = np.unique(wanted, return_inverse=True)
        self.labels, self.counts = np.zeros((self.keys.size, tasks)), np.zeros((self.keys.size, tasks))

    def add(self, keys: Ints, labels: npt.NDArray[np.float32]) -> None:
        if not self.keys.size:
            return
        at = np.searchsorted(self.keys, keys).clip(max=self.keys.size - 1)
        known = self.keys[at] == keys
        at, labels = at[known], labels[known]
        observed, size = ~np.isnan(labels), self.keys.size
        for task in range(labels.shape[1]):
            self.labels[:, task] += np.bincount(at, np.nan_to_num(labels[:, task]), size)
            self.counts[:, task] += np.bincount(at, observed[:, task], size)

    def rates(self, overall: Floats) -> Floats:
        """[wanted, tasks], smoothed."""
        smoothed: Floats = (self.labels + STRENGTH * overall) / (self.counts + STRENGTH)
        return smoothed[self.place]


def _candidates(
    config: DataConfig, manifest: LogManifest, with_items: bool
) -> Iterator[tuple[Ints, Ints | None, npt.NDArray[np.float32]]]:
    """(user, item, labels) of the candidates of every row group of the training split."""
    for place in check_files(config.log, manifest, "train", None):
        try:
            yield _row_group(place, manifest, with_items)
        except DataError:
            # Training left it out too, and named it.
            if config.on_bad != "skip":
                raise


def _row_group(
    place: RowGroup, manifest: LogManifest, with_items: bool
) -> tuple[Ints, Ints | None, npt.NDArray[np.float32]]:
    labels = [f"label_{task}" for task in manifest.tasks]
    items = ["candidate_item_id"] if with_items else []
    names = ["user_id", "num_candidates", *items, *labels]
    group = read_group(place.file, place.row_group, names, None)
    users = np.repeat(group.ints("user_id"), group.ints("num_candidates"))
    found = np.stack([_of_candidates(group, name, np.float32, users.size) for name in labels], axis=1)
    item = _of_candidates(group, "candidate_item_id", np.int64, users.size) if with_items else None
    return users, item, found


def _of_candidates(group: GroupColumns, name: str, dtype: type, count: int) -> npt.NDArray:  # type: ignore[type-arg]
    _, requests = group.lists(name)
    _, values = group.unnest(requests, name)
    found = group.flat(values, name, dtype)
    if found.size != count:
        raise group.fail(f"has {found.size} values for {count} candidates", name)
    return found
