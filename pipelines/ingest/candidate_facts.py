"""What can be said of a candidate without any history, as of its request: a sample of a log's candidates.

These facts are no features of the log. They are what a model could learn from the way in which candidates
were chosen: `pipelines.ingest.history_free` measures how much they tell of the label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import ibis
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from ibis.expr import types as ir

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.engine import Engine
from pipelines.ingest.portable_hash import digest

Values = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
RECENT_DAYS = 30
"""The days of a candidate's recent share."""
GROUPS: Mapping[str, tuple[str, ...]] = {
    "popularity": ("count", "recent_share", "rank"),
    "novelty": ("age",),
    "company": ("candidates", "same_"),
    "position": ("position",),
    "item id": ("item_id",),
}
"""Kind of fact -> how the names of its columns begin."""
_HOUR, _DAY = 3600, 86_400
_BATCH = 1 << 16
_SAMPLED, _PAIRS = "history_free_sample", "history_free_pairs"


@dataclass(frozen=True)
class Facts:
    """A sample of n candidates in an order that depends on the seed alone.

    Attributes:
        split: [n], of each candidate; request: [n], a number of its request; half: [n], 0 or 1, by request.
        label: [n], NaN where it was not observed.
        columns: name -> [n]; NaN where nothing is known.
            `position`: its place in the request, from 0. `candidates`: how many the request has.
            `count`: events of its item strictly before the request's second. `recent_share`: its share of
            all events of the 30 days before the request (of all, whole hours are counted).
            `rank`: the share of the other candidates with a smaller count, equal ones counted half.
            `age`: seconds since the item's first event; NaN where it had none before.
            `same_<level>`: how many others of the request share its category at a level of the taxonomy.
            `item_id`: the id as a number.
    """

    split: Values
    request: Values
    half: Values
    label: Floats
    columns: Mapping[str, Floats]

    @property
    def seen(self) -> npt.NDArray[np.bool_]:
        """[n], whether some event before the request has the item."""
        seen: npt.NDArray[np.bool_] = self.columns["count"] > 0
        return seen

    def of(self, group: str) -> list[str]:
        """The names of the columns of one kind of fact."""
        return [name for name in self.columns if name.startswith(GROUPS[group])]


def candidate_facts(
    engine: Engine, events: ir.Table, offered: ir.Table, most: Mapping[str, float], config: IngestConfig
) -> Facts:
    """The facts of a seeded sample of requests.

    Args:
        events: of all users, encoded; offered: the requests with their candidates.
        most: split -> the share of its requests that is drawn.
    """
    sampled = engine.keep(_SAMPLED, _sample(offered, most, config))
    pairs = sampled.select("timestamp", item_id=sampled["item_id"].unnest()).distinct()
    counts = _counts(engine, events, engine.keep(_PAIRS, pairs))
    drawn = _read(engine, sampled)
    hours = _hours(engine, events)
    for name in (_SAMPLED, _PAIRS):
        engine.drop(name)
    return _facts(drawn, counts, hours, config)


def _sample(offered: ir.Table, most: Mapping[str, float], config: IngestConfig) -> ir.Table:
    """_key, split, timestamp, and lists of the candidates' label, item_id and categories."""
    key = digest(config.seed, "history-free", offered.user_id, offered.request_id)
    # A key is hexadecimal, so that all are smaller than "g".
    limits = {name: "g" if share >= 1 else f"{int(share * 2**32):08x}" for name, share in most.items()}
    chosen = [(offered.split == split) & (key < limit) for split, limit in limits.items()]
    asked = offered.filter(reduce(lambda one, other: one | other, chosen)).mutate(_key=key)

    def each(field: str) -> ir.Value:
        return asked.candidates.map(lambda one: one[field])

    ids = {name: each(name) for name in ("item_id", *config.events.levels)}
    return asked.select("_key", "split", "timestamp", _label=each(f"label_{config.tasks[0]}"), **ids)


def _counts(engine: Engine, events: ir.Table, pairs: ir.Table) -> pa.Table:
    """item_id, timestamp, count, old, since: of each pair the events of the item before that second.

    `old` of them are older than the recent days; `since` is the item's first event, null where it has none.
    """
    none, one = (ibis.literal(number).cast("int64") for number in (0, 1))
    theirs = events.select("item_id", "timestamp").semi_join(pairs, "item_id")
    edge = pairs.timestamp - RECENT_DAYS * _DAY
    marks = ibis.union(
        theirs.select("item_id", _at="timestamp", _events=one),
        pairs.select("item_id", _at="timestamp", _events=none),
        pairs.select("item_id", _at=edge, _events=none),
    )
    seconds = marks.group_by(["item_id", "_at"]).aggregate(_events=marks["_events"].sum().cast("int64"))
    so_far = seconds["_events"].cumsum(group_by="item_id", order_by="_at").cast("int64")
    before = seconds.select("item_id", "_at", _before=so_far - seconds["_events"])
    found = pairs.mutate(_begin=edge)
    for edge_name, name in (("timestamp", "count"), ("_begin", "old")):
        known = before.rename({edge_name: "_at", name: "_before"})
        found = found.inner_join(known, ["item_id", edge_name])
    firsts = theirs.group_by("item_id").aggregate(since=theirs.timestamp.min())
    firsts = firsts.rename(_item="item_id")
    found = found.left_join(firsts, found.item_id == firsts["_item"])
    wanted = found.select("item_id", "timestamp", "count", "old", "since")
    return pa.Table.from_batches(list(engine.stream(wanted, _BATCH)))


def _read(engine: Engine, sampled: ir.Table) -> pa.Table:
    """The sample in the order of its keys."""
    batches = list(engine.stream(sampled, 1024))
    return pa.Table.from_batches(batches).combine_chunks().sort_by("_key")


def _hours(engine: Engine, events: ir.Table) -> tuple[Values, Values]:
    """-> (hours in their order, how many events there are before each, and after the last [n + 1])."""
    hours = events.group_by(hour=events.timestamp // _HOUR).aggregate(size=events.count())
    rows = sorted((int(row["hour"]), int(row["size"])) for row in engine.rows(hours))
    hour, size = np.array(rows, dtype=np.int64).reshape(-1, 2).T
    return hour, np.r_[0, np.cumsum(size)]


def _facts(drawn: pa.Table, counts: pa.Table, hours: tuple[Values, Values], config: IngestConfig) -> Facts:
    lists = drawn.column("item_id").combine_chunks()
    request = pc.list_parent_indices(lists).to_numpy()
    flat = {name: _flat(drawn.column(name)) for name in ("_label", "item_id", *config.events.levels)}
    time = drawn.column("timestamp").to_numpy()
    key = [int(text[-1], 16) % 2 for text in drawn.column("_key").to_pylist()]
    at = time[request]
    count, old, since = _looked_up(counts, flat["item_id"], at)
    hour, events = hours
    ends, begins = (
        events[np.searchsorted(hour, edge // _HOUR)].astype(np.float64)
        for edge in (at, at - RECENT_DAYS * _DAY)
    )
    size = np.bincount(request, minlength=drawn.num_rows)[request]
    first = np.searchsorted(request, request)
    columns = {
        "position": np.arange(request.size) - first,
        "candidates": size,
        "count": count,
        "recent_share": (count - old) / np.where(ends > begins, ends - begins, np.nan),
        "rank": _below(count, request) / np.where(size > 1, size - 1, np.nan),
        "age": np.where(count > 0, at - since, np.nan),
        "item_id": flat["item_id"],
    }
    for level in config.events.levels:
        columns[f"same_{level}"] = _same(flat[level], request)
    split = np.array(drawn.column("split").to_pylist(), dtype=object)[request]
    return Facts(
        split,
        request,
        np.array(key, dtype=np.int64)[request],
        flat["_label"].astype(np.float64),
        {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()},
    )


def _flat(column: pa.ChunkedArray) -> Values:
    values: Values = pc.list_flatten(column.combine_chunks()).to_numpy(zero_copy_only=False)
    return values


def _looked_up(counts: pa.Table, items: Values, at: Values) -> Sequence[Floats]:
    """[n] count, old and since of each pair of item and second."""
    known_item, known_at = (counts.column(name).to_numpy() for name in ("item_id", "timestamp"))
    # One number for each pair.
    item_values, time_values = np.unique(known_item), np.unique(known_at)

    def pair(item: Values, time: Values) -> Values:
        place: Values = np.searchsorted(item_values, item) * time_values.size
        return place + np.searchsorted(time_values, time)

    known = pair(known_item, known_at)
    order = np.argsort(known)
    place = order[np.searchsorted(known[order], pair(items, at))]
    columns = (counts.column(name).to_numpy(zero_copy_only=False) for name in ("count", "old", "since"))
    return [values[place].astype(np.float64) for values in columns]


def _below(values: Floats, request: Values) -> Floats:
    """[n] how many candidates of the same request have a smaller value, equal ones counted half."""
    order = np.lexsort((values, request))
    ordered, groups = values[order], request[order]
    new = np.r_[True, (np.diff(ordered) != 0) | (np.diff(groups) != 0)][: order.size]
    starts = np.nonzero(new)[0]
    sizes = np.diff(np.r_[starts, order.size])
    middle = (starts - np.searchsorted(groups, groups[starts])) + (sizes - 1) / 2
    below = np.empty(order.size)
    below[order] = np.repeat(middle, sizes)
    return below


def _same(categories: Values, request: Values) -> Floats:
    """[n] how many other candidates of the request share the category; NaN where it is unknown."""
    codes = np.unique(categories, return_inverse=True)[1]
    pairs = request.astype(np.int64) * (int(codes.max(initial=0)) + 1) + codes
    _, place, sizes = np.unique(pairs, return_inverse=True, return_counts=True)
    return np.where(categories != 0, sizes[place] - 1.0, np.nan)
