"""Rules and streams of sightings, as hypothesis draws them."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import strategies as st

from embeddings.ids.admission.table import ADMISSIONS
from embeddings.ids.eviction.table import EVICTIONS
from embeddings.ids.rules import IdRules
from tests.helpers.slow_ids import Seen, SmallRules

# Of both signs, and the ends of the range.
IDS = [-(1 << 63), (1 << 63) - 1, *range(-20, 28)]


class Part(NamedTuple):
    """A rank's part of a step."""

    seen: dict[int, Seen]
    newest_request: int


@st.composite
def all_rules(draw: st.DrawFn) -> SmallRules:
    ttl = draw(st.sampled_from([0, 0, 40, 200]))
    return SmallRules(
        capacity=draw(st.integers(1, 23)),
        shared_rows=draw(st.integers(1, 5)),
        admission=draw(st.sampled_from([*ADMISSIONS, "count"])),
        admit_count=draw(st.integers(2, 5)),
        counter=draw(st.sampled_from(["exact", "sketch"])),
        sketch_cells=draw(st.integers(16, 80)),
        admit_chance=draw(st.sampled_from([0.05, 0.5, 1.0])),
        eviction=draw(st.sampled_from([*EVICTIONS])),
        half_life=draw(st.sampled_from([30, 100])),
        ttl=ttl,
        protected_rows=draw(st.integers(0, 8)) if ttl else 0,
        seed=draw(st.integers(0, 1 << 40)),
    )


@st.composite
def all_maps(draw: st.DrawFn) -> dict[str, IdRules]:
    """Of one feature, and now and then of a group with a capacity of its own."""
    rules = draw(all_rules())
    part = draw(st.integers(0, 2)) * rules.buckets
    return {"item": rules, **({"item@part": rules.part("item", part)} if part else {})}


@st.composite
def streams(draw: st.DrawFn, most_ranks: int = 3) -> list[list[Part]]:
    """Steps, each of the same number of ranks. Time goes on, now and then it jumps, and it stands still."""
    ranks, now, steps = draw(st.integers(1, most_ranks)), draw(st.integers(0, 10**9)), []
    for _ in range(draw(st.integers(1, 12))):
        now += draw(st.sampled_from([0, 1, 10, 300]))
        steps.append([draw(_parts(now)) for _ in range(ranks)])
    return steps


@st.composite
def _parts(draw: st.DrawFn, now: int) -> Part:
    seen = {}
    for id_ in draw(st.lists(st.sampled_from(IDS), unique=True, max_size=14)):
        age = draw(st.sampled_from([0, 0, 5, 60, 250]))
        seen[id_] = Seen(draw(st.sampled_from([0, 1, 1, 2, 7])), now - age)
    return Part(seen, now if seen else -(1 << 63))
