"""The transactions as flat arrays, and how sorted keys are looked up and rows drawn from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Rows = npt.NDArray[Any]
_WEEKS = 64


@dataclass(frozen=True)
class Lines:
    """Lines of baskets; all arrays are [lines].

    Attributes:
        user, basket, item: ids; time: Unix seconds.
        place: a number for the store in that week.
        quantity: packages bought, 0 or less of what was given back.
        discount, coupon: whether the shop's own discount, or a coupon, lowered the price.
    """

    user: Ints
    basket: Ints
    item: Ints
    time: Ints
    place: Ints
    quantity: Ints
    discount: Flags
    coupon: Flags

    @staticmethod
    def of(transactions: pa.Table) -> Lines:
        def ints(name: str) -> Ints:
            return np.asarray(transactions[name].to_numpy(), dtype=np.int64)

        def is_lower(name: str) -> Flags:
            return np.asarray(pc.not_equal(transactions[name], 0).to_numpy())

        return Lines(
            ints("household_id"),
            ints("basket_id"),
            ints("product_id"),
            seconds(transactions["transaction_timestamp"]),
            place_of(ints("store_id"), ints("week")),
            ints("quantity"),
            is_lower("retail_disc"),
            is_lower("coupon_disc"),
        )

    def take(self, rows: Rows) -> Lines:
        """Some of the lines, by numbers or by a mask."""
        return Lines(**{name: values[rows] for name, values in vars(self).items()})


def seconds(times: pa.ChunkedArray) -> Ints:
    """Timestamps as Unix seconds."""
    return np.asarray(times.cast(pa.timestamp("s"), safe=False).cast(pa.int64()).to_numpy())


def place_of(store: Ints, week: Ints) -> Ints:
    """One number for a store in one week of the year."""
    return store * _WEEKS + week


def pair(high: Ints, low: Ints) -> Ints:
    """One number for two, of which the second is below 2^32; ordered as the two are."""
    return (high << 32) | low


def find(keys: Ints, wanted: Ints) -> Ints:
    """Where each wanted key is among sorted keys; -1 where it is not."""
    if not keys.size:
        return np.full(wanted.size, -1)
    at = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return np.where(keys[at] == wanted, at, -1)


def draw_of_each(group: Ints, most: int, generator: np.random.Generator, first: Flags | None = None) -> Flags:
    """Which rows are left if each group keeps `most` at most, by chance: bool [rows].

    Args:
        first: the rows that come before all others of their group.
    """
    later = np.zeros(group.size, dtype=bool) if first is None else ~first
    order = np.lexsort((generator.random(group.size), later, group))
    number = np.arange(group.size)
    begins = np.ones(group.size, dtype=bool)
    begins[1:] = group[order][1:] != group[order][:-1]
    kept = np.empty(group.size, dtype=bool)
    kept[order] = number - np.maximum.accumulate(np.where(begins, number, 0)) < most
    return kept
