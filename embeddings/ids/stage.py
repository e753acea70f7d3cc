"""The stage before every lookup: raw ids of a batch become rows of the tables, on all ranks alike.

Each rank looks after some buckets of each feature's map (`embeddings.ids.bucket_map`). The ids of a step go
to the ranks that look after them, all sightings of an id are added up there, and rows come back. What a step
does to a map depends on the sightings of the whole step alone, so one rank and many have the same map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from embeddings.ids.bucket_map import BucketMap, Found, Int64s, Sightings, tick_of
from embeddings.ids.exchange import Exchange, gathered
from embeddings.ids.hashing import hashed
from embeddings.ids.journal import Journal
from embeddings.ids.rules import IdRules, Ids, owner_of, part_of

_NOW, _STEPS = 0, 1


@dataclass(frozen=True)
class Taken:
    """What a step of training got.

    Attributes:
        rows: of each map, for each of the ids that this rank gave of its feature, in their order.
        new_rows: of each map, the rows that the step has given to new ids on any rank, ascending.
        journal: what takes the change back, on this rank; None unless it was asked for.
    """

    rows: Mapping[str, Int64s]
    new_rows: Mapping[str, Int64s]
    journal: Journal | None = None

    def swap(self) -> None:
        """Take the change back, or make it again; see `Journal`."""
        assert self.journal is not None
        self.journal.swap()


class IdStage:
    """The maps of all features whose ids come and go, on one rank.

    Args:
        rules: name of a map -> its rules. The map of a feature has the feature's name; others may hold a part
            of its ids (`IdRules.within`).
        rank, world_size: this rank's place; group: of all ranks, by gloo; None with one rank.

    Attributes:
        maps: name -> the part of the map that this rank looks after.
        clock: int64 [2], the time of the newest request so far, seconds, and the number of steps; the same
            on all ranks, and part of what a checkpoint keeps.
    """

    def __init__(
        self,
        rules: Mapping[str, IdRules],
        rank: int = 0,
        world_size: int = 1,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.rules, self._world_size, self._group = dict(rules), world_size, group
        self.maps = {
            name: BucketMap(each, part_of(each.buckets, rank, world_size)) for name, each in rules.items()
        }
        self.features = [name for name, each in rules.items() if not each.within]
        # Feature -> its map and those that hold a part of it.
        self._maps_of = {
            feature: [feature, *(name for name, each in rules.items() if each.within == feature)]
            for feature in self.features
        }
        self.clock = np.array([np.iinfo(np.int64).min, 0])

    @property
    def now(self) -> int:
        """Event time of the newest request so far, seconds."""
        return int(self.clock[_NOW])

    def take(self, seen: Mapping[str, Sightings], newest_request: int, keep: bool = False) -> Taken:
        """Rows for the ids of a step of training, whose maps change; collective.

        Args:
            seen: of each feature, what this rank's part of the step holds.
            newest_request: of this rank's part, seconds; keep: whether it may have to be taken back.
        """
        journal = Journal() if keep else None
        before = self.now
        now = max(before, self._over_ranks(newest_request))
        if journal is not None:
            journal.note(self.clock, np.arange(2))
        self.clock[:] = now, self.clock[_STEPS] + 1

        def take(feature: str, part: Sightings) -> list[Found]:
            return self._take(feature, part, before, journal)

        if self._world_size == 1:
            found = {feature: take(feature, seen[feature]) for feature in self.features}
            of_maps = {
                name: each
                for feature, several in found.items()
                for name, each in zip(self._maps_of[feature], several, strict=True)
            }
            rows = {name: each.rows for name, each in of_maps.items()}
            return Taken(rows, {name: each.new_rows for name, each in of_maps.items()}, journal)
        exchange = self._exchange({feature: seen[feature].ids for feature in self.features})
        columns = [[part.ids, part.counts, part.newest] for part in (seen[name] for name in self.features)]
        answers: list[list[Int64s]] = []
        new_rows: dict[str, Int64s] = {}
        for feature, came in zip(self.features, exchange.send(columns), strict=True):
            part, place = Sightings.merged(*came)
            mine = take(feature, part)
            answers.append([each.rows[place] for each in mine])
            new_rows |= zip(self._maps_of[feature], (each.new_rows for each in mine), strict=True)
        every = [np.sort(each) for each in gathered([*new_rows.values()], self._group)]
        rows = self._answered(exchange, answers)
        return Taken(rows, dict(zip(new_rows, every, strict=True)), journal)

    def look_up(self, ids: Mapping[str, Ids]) -> dict[str, Int64s]:
        """Rows for ids of features, which may repeat, in each of their maps; no map changes; collective."""
        if self._world_size == 1:
            return {
                name: self.maps[name].look_up(ids[feature])
                for feature in self.features
                for name in self._maps_of[feature]
            }
        exchange = self._exchange(ids)
        came = exchange.send([[ids[feature]] for feature in self.features])
        answers = [
            [self.maps[name].look_up(each[0]) for name in self._maps_of[feature]]
            for feature, each in zip(self.features, came, strict=True)
        ]
        return self._answered(exchange, answers)

    def _take(self, feature: str, part: Sightings, before: int, journal: Journal | None) -> list[Found]:
        """What each map of a feature does for the ids of this rank's buckets; `before`: the former now."""
        rules, step = self.rules[feature], int(self.clock[_STEPS])
        ticked = bool(rules.ttl) and (before < 0 or tick_of(self.now, rules.ttl) > tick_of(before, rules.ttl))
        whole = self.maps[feature].take(part, self.now, step, ticked, journal)
        found = [whole]
        own = np.flatnonzero(whole.rows >= rules.shared_rows)
        for name in self._maps_of[feature][1:]:
            each = self.maps[name]
            each.remove(whole.gone, journal)
            inside = Sightings(part.ids[own], part.counts[own], part.newest[own])
            some = each.take(inside, self.now, step, False, journal)
            rows = self.rules[name].shared_row(hashed(part.ids))
            rows[own] = some.rows
            found.append(replace(some, rows=rows))
        return found

    def _answered(self, exchange: Exchange, answers: list[list[Int64s]]) -> dict[str, Int64s]:
        """What each map says of the ids that this rank gave, of what it says of those that came."""
        width = max(map(len, answers))
        padded = [np.stack([*each, *each[:1] * (width - len(each))], axis=1) for each in answers]
        return {
            name: back[:, place].copy()
            for feature, back in zip(self.features, exchange.answer(padded), strict=True)
            for place, name in enumerate(self._maps_of[feature])
        }

    def _exchange(self, ids: Mapping[str, Ids]) -> Exchange:
        owners = []
        for feature in self.features:
            rules = self.rules[feature]
            bucket = rules.bucket(hashed(ids[feature]))
            owners.append(owner_of(rules.buckets, bucket, self._world_size))
        return Exchange(owners, self._group)

    def _over_ranks(self, newest: int) -> int:
        if self._world_size == 1:
            return newest
        value = torch.tensor(newest, dtype=torch.int64)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group)
        return int(value)
