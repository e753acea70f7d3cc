"""The scheduler against a plain simulation of its rules, request by request."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.serving.scheduler import BatchSettings, Scheduler, Size, Work, parts_of

SETTINGS = BatchSettings(requests=4, behaviors=40, candidates=30, cost=100)
SIZES = st.builds(
    Size, st.just(1), st.integers(0, 45), st.integers(1, 35), st.sampled_from([1, 10, 30, 60, 120])
)


def sums(sizes: list[Size]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*sizes, strict=True)))


def may_share(sizes: list[Size]) -> bool:
    most = (SETTINGS.requests, SETTINGS.behaviors, SETTINGS.candidates, SETTINGS.cost)
    return len(sizes) <= 1 or all(own <= limit for own, limit in zip(sums(sizes), most, strict=True))


@dataclass
class Plain:
    """The same policy over lists: names of bodies, and which of their requests are left."""

    left: dict[int, list[Size]] = field(default_factory=dict)
    kinds: dict[int, int] = field(default_factory=dict)
    ring: list[int] = field(default_factory=list)

    def begin(self) -> dict[int, int]:
        """How many requests of which bodies are scored next."""
        if not self.ring:
            return {}
        head = self.ring.pop(0)
        taken, of_call = {head: 1}, self.left[head][:1]
        for size in self.left[head][1:]:
            if not may_share([*of_call, size]):
                break
            of_call.append(size)
            taken[head] += 1
        for name in list(self.ring):
            rest = self.left[name]
            if self.kinds[name] == self.kinds[head] and may_share([*of_call, *rest]):
                taken[name], of_call = len(rest), [*of_call, *rest]
                self.ring.remove(name)
        return taken

    def end(self, taken: dict[int, int]) -> None:
        for name, count in taken.items():
            self.left[name] = self.left[name][count:]
            if self.left[name]:
                self.ring.append(name)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(SIZES, min_size=1, max_size=9), st.integers(0, 1)),
        st.tuples(st.just("remove"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("turn"), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(EVENTS)
def test_every_turn_is_that_of_the_plain_simulation(events: list) -> None:
    """Bodies come and go between and during calls; all requests are scored once, in order."""
    scheduler: Scheduler[int] = Scheduler(SETTINGS)
    plain, works, scored = Plain(), dict[int, Work[int]](), dict[int, int]()
    call: dict[int, int] = {}
    for kind, what, group in [*events, *[("turn", 0, 0)] * 400]:
        if kind == "add":
            name = len(works)
            works[name] = Work(name, group, what, SETTINGS)
            plain.left[name], plain.kinds[name] = list(what), group
            scheduler.add(works[name])
            plain.ring.append(name)
        elif kind == "remove" and what in works:
            scheduler.remove(works[what])
            call.pop(what, None)
            plain.ring = [name for name in plain.ring if name != what]
        elif kind == "turn":
            # The call of the turn before ends now, so that events in between came while it was under way.
            scheduler.end()
            plain.end(call)
            call = plain.begin()
            chosen = scheduler.begin()
            assert {work.owner: work.part.size.requests for work in chosen} == call
            for work in chosen:
                assert work.part.first == scored.get(work.owner, 0)
                scored[work.owner] = work.part.end
    assert not scheduler.waiting and not scheduler.under_way


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(SIZES, min_size=1, max_size=9), min_size=1, max_size=8), SIZES)
def test_nobody_waits_for_more_than_a_part_of_each(bodies: list[list[Size]], late: Size) -> None:
    """However many come later: a body is scored after one part of each of those before it."""
    scheduler: Scheduler[str] = Scheduler(SETTINGS)
    for sizes in bodies:
        scheduler.add(Work("before", 0, sizes, SETTINGS))
    scheduler.begin()
    scheduler.add(Work("late", 0, [late], SETTINGS))
    calls = 0
    while True:
        scheduler.end()
        # Newcomers, of which there are always more.
        scheduler.add(Work("newcomer", 0, [late] * 3, SETTINGS))
        chosen = scheduler.begin()
        calls += 1
        if "late" in [work.owner for work in chosen]:
            break
    assert calls <= len(bodies)


@settings(max_examples=100, deadline=None)
@given(st.lists(SIZES, min_size=1, max_size=20))
def test_parts_hold_all_requests_and_as_many_as_fit(sizes: list[Size]) -> None:
    parts = parts_of(sizes, SETTINGS)
    assert [part.first for part in parts] == [0, *(part.end for part in parts[:-1])]
    assert parts[-1].end == len(sizes)
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        assert part.size == sums(sizes[part.first : part.end])
        assert may_share(sizes[part.first : part.end])
        if following is not None:
            assert not may_share(sizes[part.first : part.end + 1])


def test_what_is_expired_is_not_begun() -> None:
    scheduler: Scheduler[int] = Scheduler(SETTINGS)
    one = Size(1, 1, 1, 1)
    for name, deadline in enumerate((1.0, 2.0, 3.0)):
        scheduler.add(Work(name, 0, [one], SETTINGS, deadline=deadline))
    assert [work.owner for work in scheduler.expire(2.0)] == [0, 1]
    assert [work.owner for work in scheduler.begin()] == [2]
    assert scheduler.expire(9.0) == []


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(SIZES, min_size=1, max_size=5), max_size=6),
    st.lists(SIZES, min_size=1, max_size=5),
    st.integers(0, 3),
)
def test_the_estimate_is_what_is_scored_where_nobody_has_company(
    bodies: list[list[Size]], sizes: list[Size], turns: int
) -> None:
    alone = replace(SETTINGS, requests=1)
    scheduler: Scheduler[str] = Scheduler(alone)
    for other in bodies:
        scheduler.add(Work("other", 0, other, alone))
    for _ in range(turns):
        scheduler.end()
        scheduler.begin()
    new = Work("new", 0, sizes, alone)
    requests, cost = scheduler.before(new)
    scheduler.add(new)
    while True:
        for work in scheduler.under_way:
            requests, cost = requests - 1, cost - work.part.size.cost
        scheduler.end()
        if not new.parts_left:
            break
        scheduler.begin()
    assert (requests, cost) == (0, 0)


@pytest.mark.parametrize("count", [1, 5])
def test_a_large_request_is_scored_whole(count: int) -> None:
    huge = Size(1, 1_000, 1_000, 10**9)
    assert [part.size.requests for part in parts_of([huge] * count, SETTINGS)] == [1] * count
