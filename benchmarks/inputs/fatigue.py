"""Raw tables of users who tire of what they are shown again: events, impressions, and the truth of them.

An item has a category and a quality, and a user likes two categories. A first showing is clicked with
p = sigmoid(-1.6 + 1.5 liked + quality); the n-th further one with p 0.25^n. The server shows again what was
not clicked, good items more often than bad ones: that is what makes a model which takes all negatives alike
think badly of good items.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

START: Final = 1_700_006_400  # a midnight
DAY: Final = 86_400
# Days: of the events, then of the impressions, of which validation and test begin on the last two.
EVENT_DAYS, SHOWN_DAYS, VALIDATION, TEST = 10, 20, "2023-12-11", "2023-12-13"
ITEMS, CATEGORIES, EVENTS = 300, 12, 12
REQUESTS, CANDIDATES = 15, 4
_BASE, _LIKED, _TIRED = -1.6, 1.5, 0.25
# Of a candidate: how often it is one that was shown before, if there is one; and how much the server prefers
# items of a better quality then.
_AGAIN, _PREFERS = 0.6, 1.5
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Fatigue:
    """The tables' files, and of every impression its user, request, item, n and probability.

    Attributes:
        exposures: how often the item was shown to the user in earlier requests.
    """

    events: Path
    impressions: Path
    user: Ints
    request: Ints
    item: Ints
    exposures: Ints
    probability: npt.NDArray[np.float64]


def fatigue(folder: Path, seed: int, users: int) -> Fatigue:
    """Write the raw tables of a seed into a folder."""
    rng = np.random.default_rng([seed, 3])
    category, quality = rng.integers(0, CATEGORIES, ITEMS), rng.normal(0, 1, ITEMS)
    rows: dict[str, list[npt.NDArray[Any]]] = {}
    events: dict[str, list[npt.NDArray[Any]]] = {}
    for user in range(1, users + 1):
        liked = rng.choice(CATEGORIES, 2, replace=False)
        acted = rng.choice(np.flatnonzero(np.isin(category, liked)), EVENTS)
        times = START + np.sort(rng.integers(0, EVENT_DAYS * DAY, EVENTS))
        _add(events, user_id=np.full(EVENTS, user), item_id=acted, category=category[acted], timestamp=times)
        first = _BASE + _LIKED * np.isin(category, liked) + quality
        _add(rows, user_id=np.full(REQUESTS * CANDIDATES, user), **_shown(rng, first, quality))
    table = {name: np.concatenate(parts) for name, parts in rows.items()}
    paths = folder / "events.parquet", folder / "impressions.parquet"
    pq.write_table(pa.table({name: np.concatenate(parts) for name, parts in events.items()}), paths[0])
    wanted = ("user_id", "request", "item_id", "timestamp", "click")
    pq.write_table(pa.table({name: table[name] for name in wanted}), paths[1])
    keys = (table["user_id"], table["request"], table["item_id"])
    return Fatigue(*paths, *keys, table["exposures"], table["probability"])


def _add(parts: dict[str, list[npt.NDArray[Any]]], **columns: npt.NDArray[Any]) -> None:
    for name, values in columns.items():
        parts.setdefault(name, []).append(values)


def _shown(
    rng: np.random.Generator, first: npt.NDArray[np.float64], quality: npt.NDArray[np.float64]
) -> dict[str, npt.NDArray[Any]]:
    """A user's impressions. `first`: [items], the logits of a first showing."""
    days = EVENT_DAYS + np.sort(rng.uniform(0, SHOWN_DAYS, REQUESTS))
    before = np.zeros(ITEMS, dtype=np.int64)
    clicked = np.zeros(ITEMS, dtype=np.bool_)
    items, exposures, chances, clicks = [], [], [], []
    preferred = np.exp(_PREFERS * quality)
    for _ in range(REQUESTS):
        chosen: list[int] = []
        for _ in range(CANDIDATES):
            again = (before > 0) & ~clicked
            again[chosen] = False
            if again.any() and rng.random() < _AGAIN:
                weights = np.where(again, preferred, 0)
                chosen.append(int(rng.choice(ITEMS, p=weights / weights.sum())))
            else:
                chosen.append(int(rng.choice(np.setdiff1d(np.arange(ITEMS), chosen))))
        at = np.array(chosen)
        chance = _TIRED ** before[at] / (1 + np.exp(-first[at]))
        click = rng.random(CANDIDATES) < chance
        items.append(at)
        exposures.append(before[at].copy())
        chances.append(chance)
        clicks.append(click)
        before[at] += 1
        clicked[at] |= click
    return {
        "request": np.repeat(np.arange(REQUESTS), CANDIDATES),
        "item_id": np.concatenate(items),
        "timestamp": np.repeat(START + (days * DAY).astype(np.int64), CANDIDATES),
        "exposures": np.concatenate(exposures),
        "probability": np.concatenate(chances),
        "click": np.concatenate(clicks).astype(np.int64),
    }
