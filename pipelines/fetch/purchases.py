"""Requests of the domain `purchase`: baskets, what was bought in them and what was not.

Whatever is drawn beside a bought product differs from it in neither of two things that would tell it apart at
once. It was shown (on a display, or in the mailer of the basket's store and week) if and only if the bought
one was. And it is drawn in proportion to what everybody had bought before the basket, so that it is as
popular. A product that nobody had bought before is no candidate, bought or not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.fetch.sold import Flags, Ints, Lines, draw_of_each, find, pair, place_of

# Products whose quantity is no number of packages: petrol, and what a till adds to it.
MEASURED = {"department": ["FUEL"], "product_category": ["COUPON/MISC ITEMS", "FUEL"]}
SPOTS = ("display", "mailer")
_NOWHERE = "0"
_ROUNDS = 40


@dataclass(frozen=True)
class PurchaseDraw:
    """How much is drawn of all baskets.

    Attributes:
        baskets: of a household, at most; bought: lines of a basket, at most.
        others: products that were not bought, beside each that was.
    """

    baskets: int = 48
    bought: int = 6
    others: int = 4


@dataclass(frozen=True)
class Shown:
    """What stores showed: a row for each place (a store in a week) and product, in the order of `keys`.

    Attributes:
        keys: place and item as one number, see `pair`, ascending.
        words: the different ways to show a product; how: index into these, of each key.
        places: those of which anything is known, ascending.
    """

    keys: Ints
    words: pa.Array
    how: Ints
    places: Ints

    @staticmethod
    def of(promotions: Iterable[pa.RecordBatch]) -> Shown:
        """Where a store showed a product in several ways in one week, the first counts."""
        known: dict[str, int] = {}
        parts: list[tuple[Ints, Ints]] = []
        for batch in promotions:
            spots = [batch.column(f"{name}_location").dictionary_encode() for name in SPOTS]
            displays, mailers = (spot.dictionary.to_pylist() for spot in spots)
            words = [_word(display, mailer) for display in displays for mailer in mailers]
            numbers = np.array([known.setdefault(word, len(known)) for word in words], dtype=np.int16)
            display, mailer = (spot.indices.to_numpy().astype(np.int64) for spot in spots)
            store, week, item = (batch.column(name).to_numpy() for name in ("store_id", "week", "product_id"))
            parts.append((pair(place_of(store, week), item), numbers[display * len(mailers) + mailer]))
        keys, how = (np.concatenate(values) for values in zip(*parts, strict=True))
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        first = np.ones(keys.size, dtype=bool)
        first[1:] = keys[1:] != keys[:-1]
        keys, how = keys[first], how[order[first]]
        return Shown(keys, pa.array(known, pa.string()), how, np.unique(keys >> 32))

    def find(self, place: Ints, item: Ints) -> Ints:
        """Where each item is among what was shown; -1 where it is not."""
        return find(self.keys, pair(place, item))

    def tell(self, found: Ints) -> pa.Array:
        """The words of what `find` found; null where an item was not shown."""
        return self.words.take(pa.array(self.how[found], mask=found < 0))


def _word(display: str, mailer: str) -> str:
    """One word for a display and a mailer."""
    spots = zip(SPOTS, (display, mailer), strict=True)
    return ", ".join(f"{name} {spot}" for name, spot in spots if spot != _NOWHERE)


@dataclass(frozen=True)
class Sold:
    """What all stores sold: the items by time, and since when each is sold (`items` ascending)."""

    item: Ints
    time: Ints
    items: Ints
    since: Ints

    @staticmethod
    def of(lines: Lines) -> Sold:
        order = np.lexsort((lines.item, lines.time))
        item, time = lines.item[order], lines.time[order]
        items, first = np.unique(item, return_index=True)
        return Sold(item, time, items, time[first])

    def knew(self, item: Ints, time: Ints) -> Flags:
        """Whether anybody had bought each item before a time."""
        return self.since[find(self.items, item)] < time


@dataclass(frozen=True)
class Baskets:
    """The baskets in which something was bought, numbered.

    Attributes:
        ids: ascending; first: a line of each; time: of the first line, in seconds.
        held: number and item of all that was in them, also what was given back; see `pair`, ascending.
    """

    ids: Ints
    first: Ints
    time: Ints
    held: Ints

    @staticmethod
    def of(bought: Lines, every: Lines) -> Baskets:
        ids, first = np.unique(bought.basket, return_index=True)
        time = bought.time[first]
        np.minimum.at(time, np.searchsorted(ids, bought.basket), bought.time)
        number = find(ids, every.basket)
        return Baskets(ids, first, time, np.unique(pair(number, every.item)[number >= 0]))

    def number(self, basket: Ints) -> Ints:
        return find(self.ids, basket)


@dataclass(frozen=True)
class Slots:
    """Places of candidates that were not bought: the bought line beside, number and time of its basket.

    `is_shown`: whether the candidate is to be one that was shown.
    """

    beside: Lines
    number: Ints
    time: Ints
    is_shown: Flags


def purchases(
    transactions: pa.Table,
    products: pa.Table,
    promotions: Iterable[pa.RecordBatch],
    draw: PurchaseDraw,
    seed: int,
) -> tuple[pa.Table, dict[str, int]]:
    """The candidates of baskets, with labels, and counts of what became of the transactions.

    Args:
        promotions: in pieces, for they are twenty million.
    """
    generator = np.random.default_rng([seed, 1])
    every = Lines.of(transactions)
    lines = every.take(every.quantity > 0)
    shown, sold, baskets = Shown.of(promotions), Sold.of(lines), Baskets.of(lines, every)
    number, time = baskets.number(lines.basket), baskets.time

    known = find(shown.places, lines.place[baskets.first]) >= 0
    asked = known.copy()
    asked[known] = draw_of_each(lines.user[baskets.first][known], draw.baskets, generator)
    theirs = np.flatnonzero(asked[number])
    old = theirs[sold.knew(lines.item[theirs], time[number[theirs]])]
    chosen = old[draw_of_each(number[old], draw.bought, generator)]

    bought, number = lines.take(chosen), number[chosen]
    is_shown = shown.find(bought.place, bought.item) >= 0
    slots = np.repeat(np.arange(chosen.size), draw.others)
    wanted = Slots(bought.take(slots), number[slots], time[number[slots]], is_shown[slots])
    others = _draw_others(wanted, baskets, sold, shown, generator)
    slots, others = slots[others >= 0], others[others >= 0]
    counts = {
        "baskets": int(known.size),
        "baskets_of_stores_and_weeks_without_promotions": int((~known).sum()),
        "baskets_drawn": int(asked.sum()),
        "lines_of_these": int(theirs.size),
        "lines_of_new_products": int(theirs.size - old.size),
        "requests": int(np.unique(number).size),
        "bought": int(chosen.size),
        "bought_and_shown": int(is_shown.sum()),
        "not_bought": int(others.size),
        "not_found": int(chosen.size * draw.others - others.size),
    }
    item = np.concatenate([bought.item, others])
    time = time[np.concatenate([number, number[slots]])]
    # The bought ones, and then one line beside each of the others.
    both = bought.take(np.concatenate([np.arange(chosen.size), slots]))
    was_bought = np.arange(item.size) < chosen.size
    packages = was_bought & ~_is_measured(products, item)
    shown_as = shown.tell(shown.find(both.place, item))
    return _table(both, item, time, was_bought, packages, shown_as), counts


def _table(
    beside: Lines, item: Ints, time: Ints, was_bought: Flags, packages: Flags, shown_as: pa.Array
) -> pa.Table:
    """Candidates as impressions have them.

    Args:
        beside: the bought line that each candidate is, or stands beside.
        packages: those that were bought, and whose quantity is a number of packages.
    """
    return pa.table(
        {
            "user_id": beside.user,
            "request_id": beside.basket,
            "timestamp": time,
            "item_id": item,
            "domain": pa.array(["purchase"] * item.size, pa.string()),
            "shown_as": shown_as,
            "bought": pa.array(was_bought),
            "discounted": pa.array(was_bought & beside.discount),
            "on_discount": pa.array(beside.discount, mask=~was_bought),
            "several": pa.array(beside.quantity > 1, mask=~packages),
            "with_coupon": pa.array(beside.coupon, mask=~was_bought),
            "redeemed": pa.nulls(item.size, pa.bool_()),
        }
    )


def _is_measured(products: pa.Table, item: Ints) -> Flags:
    """Whether the quantity of an item is no number of packages."""
    measured = np.zeros(products.num_rows, dtype=bool)
    for name, values in MEASURED.items():
        is_in = pc.is_in(products[name], value_set=pa.array(values, pa.string()))
        measured |= np.asarray(is_in.to_numpy())
    items = np.unique(products["product_id"].to_numpy()[measured])
    return find(items, item) >= 0


def _draw_others(
    wanted: Slots, baskets: Baskets, sold: Sold, shown: Shown, generator: np.random.Generator
) -> Ints:
    """An item for each slot, which nobody put into the basket and no other slot of it has; -1: none found."""
    items = np.full(wanted.number.size, -1)
    earlier = np.searchsorted(sold.time, wanted.time)
    left, drawn = np.arange(items.size), np.zeros(0, dtype=np.int64)
    for _ in range(_ROUNDS):
        item = sold.item[(generator.random(left.size) * earlier[left]).astype(np.int64)]
        key = pair(wanted.number[left], item)
        fits = (shown.find(wanted.beside.place[left], item) >= 0) == wanted.is_shown[left]
        fits &= (find(baskets.held, key) < 0) & (find(drawn, key) < 0)
        good = np.flatnonzero(fits)
        good = good[np.unique(key[good], return_index=True)[1]]
        items[left[good]] = item[good]
        drawn = np.sort(np.concatenate([drawn, key[good]]), kind="stable")
        left = left[items[left] < 0]
    return items
