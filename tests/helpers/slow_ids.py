"""The map from ids to rows by dicts, one id after another: the slow reference of `embeddings.ids`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from embeddings.ids.bucket_map import Sightings
from embeddings.ids.rules import IdRules

_MASK = (1 << 64) - 1


class Seen(NamedTuple):
    """An id of a step: sightings that count, and the newest event time."""

    count: int
    newest: int


@dataclass(frozen=True)
class SmallRules(IdRules):
    """With buckets of four to seven rows, so that short streams fill them."""

    @property
    def buckets(self) -> int:
        return self.bucket_count or max(1, self.capacity // 4)


def mixed(number: int) -> int:
    """SplitMix64."""
    z = (number + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def hash_of(id_: int) -> int:
    return mixed(id_ & _MASK)


def bucket_of(id_: int, rules: IdRules) -> int:
    return (hash_of(id_) >> 32) * rules.buckets >> 32


class SlowAll:
    def admits(self, id_: int, count: int, step: int) -> bool:
        return count > 0

    def close(self) -> None:
        """The step is over."""


class SlowExact(SlowAll):
    def __init__(self, rules: IdRules) -> None:
        self.rules, self.waiting = rules, Counter[int]()

    def admits(self, id_: int, count: int, step: int) -> bool:
        self.waiting[id_] += count
        enough = count > 0 and self.waiting[id_] >= self.rules.admit_count
        if enough:
            del self.waiting[id_]
        return enough


class SlowSketch(SlowAll):
    def __init__(self, rules: IdRules) -> None:
        self.rules, self.width = rules, -(-rules.sketch_cells // rules.buckets)
        self.cells: dict[int, dict[tuple[int, int], int]] = defaultdict(dict)
        self.sums, self.grown = Counter[int](), dict[int, int]()

    def admits(self, id_: int, count: int, step: int) -> bool:
        if not count:
            return False
        estimate, k = min(self.cells_of(id_)), self.rules.admit_count
        self.grown[id_] = max(estimate, min(estimate + count, k))
        return self.grown[id_] >= k

    def places(self, id_: int) -> list[tuple[int, int]]:
        hashes = ((hash_of(id_) + mixed(row)) & _MASK for row in range(4))
        return [(row, (mixed(each) >> 32) * self.width >> 32) for row, each in enumerate(hashes)]

    def close(self) -> None:
        befores = {id_: self.cells_of(id_) for id_ in self.grown}
        for id_, after in self.grown.items():
            bucket = bucket_of(id_, self.rules)
            self.sums[bucket] += after - min(befores[id_])
            cells = self.cells[bucket]
            cells.update({place: max(cells.get(place, 0), after) for place in self.places(id_)})
        for bucket in {bucket_of(id_, self.rules) for id_ in self.grown}:
            self.halve(bucket)
        self.grown = {}

    def cells_of(self, id_: int) -> list[int]:
        return [self.cells[bucket_of(id_, self.rules)].get(place, 0) for place in self.places(id_)]

    def halve(self, bucket: int) -> None:
        while self.sums[bucket] * 2 > self.width * (self.rules.admit_count - 1):
            self.sums[bucket] //= 2
            self.cells[bucket] = {place: value // 2 for place, value in self.cells[bucket].items()}


class SlowChance(SlowAll):
    def __init__(self, rules: IdRules) -> None:
        self.rules = rules

    def admits(self, id_: int, count: int, step: int) -> bool:
        draw = mixed(hash_of(id_) ^ mixed((mixed(self.rules.seed) + step) & _MASK)) >> 32
        return draw < (1 << 32) - power_of(self.rules.admit_chance, count)


def power_of(chance: float, count: int) -> int:
    """(1 - chance)^count, in parts of 2^32."""
    base = (1 << 32) - max(1, round(chance * (1 << 32)))
    power = 1 << 32
    while count:
        if count & 1:
            power = power * base >> 32
        base, count = base * base >> 32, count >> 1
    return power


def faded(rules: IdRules, uses: int, before: int, now: int) -> int:
    if rules.eviction != "lfu_decay":
        return uses
    return uses >> max(0, now // rules.half_life - before // rules.half_life)


def goes_first(rules: IdRules, uses: int, last: int, now: int) -> tuple[int, ...]:
    """The row with the lowest gives way."""
    if rules.eviction == "lru":
        return (max(last, 0),)
    return faded(rules, uses, last, now), max(last, 0)


@dataclass
class Row:
    id: int
    last: int
    uses: int


class SlowMap:
    """All buckets of a feature's map."""

    def __init__(self, rules: IdRules) -> None:
        self.rules, self.now, self.steps, self.counts = rules, -(1 << 63), 0, Counter[str]()
        # Those that lost their rows in the newest step.
        self.gone: set[int] = set()
        # (bucket, way) -> what has the row.
        self.held: dict[tuple[int, int], Row] = {}
        makers = {"all": lambda _: SlowAll(), "chance": SlowChance}
        makers["count"] = SlowExact if rules.counter == "exact" else SlowSketch
        self.admission = makers[rules.admission](rules)

    def rows(self) -> dict[int, int]:
        """Row of each id that has one."""
        ways, shared = self.rules.ways, self.rules.shared_rows
        return {row.id: shared + bucket * ways + way for (bucket, way), row in self.held.items()}

    def row_of(self, id_: int) -> int:
        shared = (mixed(hash_of(id_)) >> 32) * self.rules.shared_rows >> 32
        return self.rows().get(id_, shared)

    def take(self, seen: Mapping[int, Seen], newest_request: int) -> set[int]:
        """Let the map have a step -> the rows that went to new ids."""
        before, self.now, self.steps = self.now, max(self.now, newest_request), self.steps + 1
        self.gone, tick = set(), max(1, self.rules.ttl // 16)
        if self.rules.ttl and (before < 0 or self.now // tick > before // tick):
            self._expire()
        known = {row.id: row for row in self.held.values()}
        for id_ in known.keys() & seen.keys():
            row, (count, newest) = known[id_], seen[id_]
            last = max(row.last, newest)
            row.uses, row.last = faded(self.rules, row.uses, row.last, last) + count, last
            self.counts["known"] += 1
        admitted = [*self._admitted({i: each for i, each in seen.items() if i not in known})]
        in_use = {place for place, row in self.held.items() if row.id in seen}
        new = set()
        for id_ in sorted(admitted, key=lambda i: (-seen[i].count, -seen[i].newest, hash_of(i))):
            place = self._room(bucket_of(id_, self.rules), in_use)
            if place is None:
                self.counts["crowded"] += 1
                continue
            self.counts["admitted"] += 1
            if place in self.held:
                self.counts["evicted"] += 1
                self.gone.add(self.held[place].id)
            self.held[place] = Row(id_, seen[id_].newest, seen[id_].count)
            in_use.add(place)
            new.add(self.rules.shared_rows + place[0] * self.rules.ways + place[1])
        return new

    def _admitted(self, unknown: Mapping[int, Seen]) -> Iterator[int]:
        for id_, (count, newest) in unknown.items():
            young = not self.rules.ttl or newest >= self.now - self.rules.ttl
            if young and self.admission.admits(id_, count, self.steps):
                yield id_
            else:
                self.counts["rejected"] += 1
        self.admission.close()

    def _room(self, bucket: int, in_use: set[tuple[int, int]]) -> tuple[int, int] | None:
        places = [(bucket, way) for way in range(self.rules.ways)]
        free = [place for place in places if place not in self.held]
        if free:
            return free[0]
        others = [place for place in places if place not in in_use]
        if not others or self.rules.eviction == "never":
            return None
        return min(
            others, key=lambda p: goes_first(self.rules, self.held[p].uses, self.held[p].last, self.now)
        )

    def _expire(self) -> None:
        protected = -(-self.rules.protected_rows // self.rules.buckets)
        for bucket in range(self.rules.buckets):
            places = sorted(place for place in self.held if place[0] == bucket)
            # The last ways of those seen last stay.
            newest = sorted(places, key=lambda place: (self.held[place].last, place[1]))
            stay = set(newest[-protected:] if protected else ())
            for place in places:
                if self.held[place].last < self.now - self.rules.ttl and place not in stay:
                    self.gone.add(self.held.pop(place).id)
                    self.counts["expired"] += 1


class SlowStage:
    """The maps of a feature: its own, and those that hold a part of its ids."""

    def __init__(self, rules: Mapping[str, IdRules]) -> None:
        self.maps = {name: SlowMap(each) for name, each in rules.items()}

    def take(self, seen: Mapping[int, Seen], newest_request: int) -> dict[str, set[int]]:
        """Let each map have a step -> its rows that went to new ids."""
        whole, *parts = self.maps.values()
        new = [whole.take(seen, newest_request)]
        for part in parts:
            part.held = {place: row for place, row in part.held.items() if row.id not in whole.gone}
            new.append(part.take({id_: seen[id_] for id_ in seen if id_ in whole.rows()}, newest_request))
        return dict(zip(self.maps, new, strict=True))


def sightings_of(seen: Mapping[int, Seen]) -> Sightings:
    columns = [[*seen], [each.count for each in seen.values()], [each.newest for each in seen.values()]]
    return Sightings(*(np.array(column, dtype=np.int64) for column in columns))


def merged(parts: list[dict[int, Seen]]) -> dict[int, Seen]:
    """All ranks' sightings of a step."""
    found: dict[int, Seen] = {}
    for part in parts:
        for id_, (count, newest) in part.items():
            before = found.get(id_, Seen(0, newest))
            found[id_] = Seen(before.count + count, max(before.newest, newest))
    return found
