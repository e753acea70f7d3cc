"""The features of a candidate's item as of the request: what was known strictly before its second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import ibis
from ibis.expr import types as ir

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.encode import no_ids
from pipelines.ingest.engine import Engine
from pipelines.ingest.protocols.protocol import REQUEST, Tables

# What the engine keeps only until the states of items are made: as many rows as their events have seconds.
_PASSING = ("item_known", "item_filled")


@dataclass(frozen=True)
class Attributes:
    """What the events say of items.

    A feature that has one value from an item's first event on is taken for constant, as a catalogue would
    have it: the item has it at any time. Another one has, at a request, the last value before it.

    Attributes:
        multi: feature -> whether it is multi-valued.
        fixed: item_id and the features, null where unknown or where the item changes in it.
        states: item_id, _since, _state (number, from 1), _part (of `parts` of the items) and `changing`, of
            the items that change in any of these; None if there is none.
        changing: feature -> how many items change in it, for those in which some do.
        items: how many items have events.
        given: item_id and features, of a table of items; these never change.
    """

    multi: Mapping[str, bool]
    fixed: ir.Table
    states: ir.Table | None
    changing: Mapping[str, int]
    items: int
    given: ir.Table | None = None
    parts: int = 1


def item_attributes(engine: Engine, tables: Tables, config: IngestConfig, parts: int) -> Attributes:
    """Collects the attributes of all items; those that change, for a part of the items at a time."""
    given = [] if tables.items is None else tables.items.columns
    lacking = {entry.name: entry.multi for entry in config.all_features if entry.side == "both"}
    del lacking["item_id"]
    shown = tables.impressions
    if shown is not None and (said := [name for name in lacking if name in shown.columns]):
        # Left are the features that the impressions lack, or lack in some of their rows.
        sums = {name: null_if_unknown(shown[name], lacking[name]).isnull().sum() for name in said}
        unknown = engine.rows(shown.aggregate(**sums))[0]
        lacking = {name: lacking[name] for name in lacking if name not in said or unknown[name]}
    multi = {name: several for name, several in lacking.items() if name not in given}
    events = tables.events
    values = {name: null_if_unknown(events[name], several) for name, several in multi.items()}
    ends = {name: value.min() for name, value in values.items()}
    ends |= {f"_most_{name}": value.max() for name, value in values.items()}
    ends |= {f"_from_{name}": events.timestamp.min(where=value.notnull()) for name, value in values.items()}
    grouped = events.group_by("item_id").aggregate(_since=events.timestamp.min(), **ends)
    spans = engine.keep("item_spans", grouped)
    # An item that first had no value changes, too: a request in between does not know the later value.
    changes = {
        name: (
            (spans[name] != spans[f"_most_{name}"]) | (spans[f"_from_{name}"] != spans["_since"])
        ).fill_null(False)
        for name in multi
    }
    sums = {name: change.cast("int64").sum() for name, change in changes.items()}
    counts = engine.rows(spans.aggregate(_of=spans.count(), **sums))[0]
    changing = {name: int(counts[name]) for name in multi if counts[name]}
    fixed = {
        name: ibis.ifelse(changes[name], ibis.null(spans[name].type()), spans[name])
        if name in changing
        else spans[name]
        for name in multi
    }
    states = None
    if changing:
        changed = reduce(lambda one, other: one | other, (changes[name] for name in changing))
        items = spans.filter(changed).select("item_id")
        states = _states(engine, events, items, {name: multi[name] for name in changing}, parts)
    used = None
    if tables.items is not None and (names := [name for name in lacking if name in given]):
        used = tables.items.select("item_id", *names)
    return Attributes(
        lacking, spans.select("item_id", **fixed), states, changing, int(counts["_of"]), used, parts
    )


def _states(
    engine: Engine, events: ir.Table, items: ir.Table, multi: Mapping[str, bool], parts: int
) -> ir.Table:
    """A row for each second in which an item's last known features become others."""
    found = events
    for part in range(parts):
        some = items.filter(_part_of(items, parts) == part) if parts > 1 else items
        theirs = events.semi_join(some, "item_id")
        seconds = theirs.group_by(["item_id", "timestamp"]).aggregate(
            **{name: null_if_unknown(theirs[name], several).max() for name, several in multi.items()}
        )
        states = _fill_up(engine, seconds, list(multi)).mutate(_part=ibis.literal(part).cast("int64"))
        found = engine.append("item_states", states)
    for name in _PASSING:
        engine.drop(name)
    return found


def _part_of(items: ir.Table, parts: int) -> ir.IntegerValue:
    """The part of each item, from 0; raw ids may be negative, and then so is the remainder."""
    return (items.item_id % parts + parts) % parts


def _fill_up(engine: Engine, seconds: ir.Table, names: Sequence[str]) -> ir.Table:
    """item_id, _since, _state, and what is known after each second that changed something."""
    # As SQL: a last value that skips nulls loses this skip on its way through Ibis. All features share one
    # window, which the engine sorts once.
    known_then, filled_up = _PASSING
    kept = engine.keep(known_then, seconds)
    over = 'OVER (PARTITION BY "item_id" ORDER BY "timestamp")'
    columns = (f'LAST_VALUE("{name}" IGNORE NULLS) {over} AS "{name}"' for name in names)
    query = f'SELECT "item_id", "timestamp", {", ".join(columns)} FROM "{kept.get_name()}"'
    filled = engine.keep(filled_up, engine.query(query, kept.schema()))
    order = ibis.window(group_by="item_id", order_by="timestamp")
    was = {f"_was_{name}": filled[name].lag().over(order) for name in names}
    filled = filled.mutate(**was)
    same = (filled[name].identical_to(filled[f"_was_{name}"]) for name in names)
    filled = filled.mutate(_same=reduce(lambda one, other: one & other, same))
    changed = filled.filter(~filled["_same"])
    state = ibis.row_number().over(group_by="item_id", order_by=changed.timestamp) + 1
    return changed.select("item_id", *names, _since=changed.timestamp, _state=state.cast("int64"))


def null_if_unknown(values: ir.Value, multi: bool) -> ir.Value:
    """Null where a value is unknown: id 0, or no ids at all."""
    return ibis.cases((values.length() > 0, values)) if multi else values.nullif(0)


def with_attributes(
    engine: Engine, attributes: Attributes, candidates: ir.Table, asked: ir.Table, round_: int
) -> ir.Table:
    """Adds the features of items; what a candidate itself says of them comes first, where it is known.

    `round_` numbers the calls: each is about other candidates.
    """
    multi = attributes.multi
    if not multi:
        return candidates
    joined, sources = candidates, [attributes.fixed]
    if attributes.given is not None:
        sources.insert(0, attributes.given)
    if attributes.states is not None:
        joined = joined.inner_join(asked.select(*REQUEST, _at=asked.timestamp), REQUEST)
        pairs = joined.select("item_id", "_at").distinct()
        wanted = as_of = engine.keep("item_seconds", pairs)
        for part in range(attributes.parts):
            parts = attributes.parts
            some = wanted.filter(_part_of(wanted, parts) == part) if parts > 1 else wanted
            theirs = attributes.states.filter(attributes.states["_part"] == part).drop("_part")
            of_part = _as_of(some, theirs).mutate(_round=ibis.literal(round_).cast("int64"))
            as_of = engine.append("known_items", of_part)
        sources.append(as_of.filter(as_of["_round"] == round_).drop("_round"))
    for number, source in enumerate(sources):
        part = source.rename(lambda name, number=number: f"_{number}_{name}")
        keys = [name for name in ("item_id", "_at") if name in source.columns]
        joined = joined.left_join(part, [joined[key] == part[f"_{number}_{key}"] for key in keys])

    def value(name: str) -> ir.Value:
        places = [name, *(f"_{number}_{name}" for number in range(len(sources)))]
        said = [null_if_unknown(joined[place], multi[name]) for place in places if place in joined.columns]
        return ibis.coalesce(*said, no_ids() if multi[name] else 0)

    others = [name for name in candidates.columns if name not in multi]
    return joined.select(*others, **{name: value(name) for name in multi})


def _as_of(wanted: ir.Table, states: ir.Table) -> ir.Table:
    """item_id, _at and the features in the item's last state strictly before the second `_at`.

    Both are put on one line of time and counted, since not every engine joins by nearness.
    """
    none, one = (ibis.literal(number).cast("int64") for number in (0, 1))
    theirs = states.semi_join(wanted, "item_id")
    marks = ibis.union(
        wanted.select("item_id", "_at", _begins=none),
        theirs.select("item_id", _at=theirs["_since"], _begins=one),
    )
    marks = marks.group_by(["item_id", "_at"]).aggregate(_begins=marks["_begins"].sum().cast("int64"))
    so_far = marks["_begins"].cumsum(group_by="item_id", order_by="_at").cast("int64")
    marks = marks.select("item_id", "_at", _state=so_far - marks["_begins"])
    marks = marks.filter(marks["_state"] > 0).semi_join(wanted, ["item_id", "_at"])
    return marks.inner_join(states.drop("_since"), ["item_id", "_state"]).drop("_state")
