"""The stage before every lookup: raw ids of a batch become rows of the tables, on all ranks alike.

Each rank looks after some buckets of each feature's map (`embeddings.ids.bucket_map`). The ids of a step go
to the ranks that look after them, all sightings of an id are added up there, and rows come back. What a step
does to a map depends on the sightings of the whole step alone, so one rank and many have the same map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
        rows: of each feature, for each of the ids that this rank gave, in their order.
        new_rows: of each feature, the rows that the step has given to new ids on any rank, ascending.
        journals: what takes the change back, on this rank; empty unless it was asked for.
    """

    rows: Mapping[str, Int64s]
    new_rows: Mapping[str, Int64s]
    journals: tuple[Journal, ...] = ()

    def swap(self) -> None:
        """Take the change back, or make it again; see `Journal`."""
        for journal in self.journals:
            journal.swap()


class IdStage:
    """The maps of all features whose ids come and go, on one rank.

    Args:
        rules: feature -> its rules; rank, world_size: this rank's place.
        group: of all ranks, by gloo; None with one rank.

    Attributes:
        maps: feature -> the part of its map that this rank looks after.
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
        journals: list[Journal] = []
        before = self.now
        now = max(before, self._over_ranks(newest_request))
        if keep:
            clock = Journal()
            clock.note(self.clock, np.arange(2))
            journals.append(clock)
        self.clock[:] = now, self.clock[_STEPS] + 1

        def take(name: str, part: Sightings) -> Found:
            ttl = self.rules[name].ttl
            ticked = bool(ttl) and (before < 0 or tick_of(now, ttl) > tick_of(before, ttl))
            found = self.maps[name].take(part, now, int(self.clock[_STEPS]), ticked, keep)
            if found.journal is not None:
                journals.append(found.journal)
            return found

        if self._world_size == 1:
            found = {name: take(name, seen[name]) for name in self.rules}
            rows = {name: each.rows for name, each in found.items()}
            return Taken(rows, {name: each.new_rows for name, each in found.items()}, tuple(journals))
        exchange = self._exchange({name: seen[name].ids for name in self.rules})
        columns = [[part.ids, part.counts, part.newest] for part in (seen[name] for name in self.rules)]
        answers, new_rows = [], []
        for name, came in zip(self.rules, exchange.send(columns), strict=True):
            part, place = Sightings.merged(*came)
            mine = take(name, part)
            answers.append(mine.rows[place])
            new_rows.append(mine.new_rows)
        rows = dict(zip(self.rules, exchange.answer(answers), strict=True))
        every = [np.sort(each) for each in gathered(new_rows, self._group)]
        return Taken(rows, dict(zip(self.rules, every, strict=True)), tuple(journals))

    def look_up(self, ids: Mapping[str, Ids]) -> dict[str, Int64s]:
        """Rows for ids, which may repeat; no map changes; collective."""
        if self._world_size == 1:
            return {name: self.maps[name].look_up(ids[name]) for name in self.rules}
        exchange = self._exchange(ids)
        came = exchange.send([[ids[name]] for name in self.rules])
        answers = [self.maps[name].look_up(each[0]) for name, each in zip(self.rules, came, strict=True)]
        return dict(zip(self.rules, exchange.answer(answers), strict=True))

    def _exchange(self, ids: Mapping[str, Ids]) -> Exchange:
        owners = []
        for name, rules in self.rules.items():
            bucket = rules.bucket(hashed(ids[name]))
            owners.append(owner_of(rules.buckets, bucket, self._world_size))
        return Exchange(owners, self._group)

    def _over_ranks(self, newest: int) -> int:
        if self._world_size == 1:
            return newest
        value = torch.tensor(newest, dtype=torch.int64)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group)
        return int(value)
