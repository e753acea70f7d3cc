"""More even memory: of the plans that are about as fast, the one whose fullest rank holds least.

TorchRec's planner takes the plan with the least estimated time, however much of its memory one rank or node
then holds. A rank that is nearly full has no room for activations, its node none for the copies that saves
are made from, and all ranks wait for the one that has most to save.

Everything here goes in by the planner's own doors: what it rates is recorded by its performance model, more
plans are asked for by a proposer that comes last, and a callback hands back the one that is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from torchrec.distributed.planner.perf_models import NoopPerfModel
from torchrec.distributed.planner.types import Enumerator, PlannerError, Proposer, ShardingOption, Topology

from embeddings.plan.exchange_places import Numbers, exchange_places, shares

# A share of a rank's room for tables that is worth a change. Tables that fill less lie as they would.
WORTH = 0.01
# The changes of one table that are tried, and how many of a rank's largest tables are changed.
_TRIES, _LARGEST = 48, 4


@dataclass(frozen=True)
class Rated:
    """A plan that the planner has rated.

    Attributes:
        time: estimated ms of the rank that has most to do.
        fullest: what the fullest rank holds, as a share of a rank's room for tables.
        options: of all tables; ranks: of the shards of each, since the planner uses its options again.
    """

    time: float
    fullest: float
    options: tuple[ShardingOption, ...]
    ranks: tuple[tuple[int, ...], ...]

    def placed(self) -> list[ShardingOption]:
        """The options, their shards on the ranks of this plan."""
        for option, ranks in zip(self.options, self.ranks, strict=True):
            for shard, rank in zip(option.shards, ranks, strict=True):
                shard.rank = rank
        return list(self.options)

    def as_good_as(self, other: Rated) -> bool:
        """Whether it is neither slower nor less even."""
        return self.time <= other.time and self.fullest <= other.fullest


class RecordedPlans(NoopPerfModel):  # type: ignore[misc]
    """TorchRec's estimate of a plan's time, which keeps what it has rated.

    Args:
        room: bytes of device and of host memory that tables may take of a rank.
        within: how much slower than the fastest the plan that is taken may be, as a share of its time.
        balanced: gives a plan's shards their ranks in another way.

    Attributes:
        fastest: the plan that the planner would take; None before it has rated one.
        front: the plans of which none is both as fast and as even, the fastest first.
    """

    def __init__(
        self,
        topology: Topology,
        room: tuple[int, int],
        within: float,
        balanced: Callable[[list[ShardingOption]], object],
    ) -> None:
        super().__init__(topology)
        self._nodes, self._room = (topology.world_size, topology.local_world_size), room
        self._within, self._balanced, self._open = within, balanced, True
        self.fastest: Rated | None = None
        self.front: list[Rated] = []

    def close(self) -> None:
        """What is rated from here on was not proposed for its speed."""
        self._open = False

    def rate(self, plan: list[ShardingOption]) -> float:
        """Estimated ms of the rank that has most to do."""
        ranks = tuple(tuple(shard.rank for shard in option.shards) for option in plan)
        fullest = float(self.shares(plan).max())
        found = Rated(float(super().rate(plan)), fullest, tuple(plan), ranks)
        if self._open and (self.fastest is None or found.time < self.fastest.time):
            self.fastest = found
        if not any(known.as_good_as(found) for known in self.front):
            kept = [each for each in self.front if not found.as_good_as(each)]
            self.front = sorted([*kept, found], key=lambda plan: plan.time)
        return found.time

    def shares(self, plan: Sequence[ShardingOption]) -> Numbers:
        """What each rank holds, as a share of its room."""
        return shares(plan, self._nodes[0], self._room)

    @property
    def limit(self) -> float:
        """The most ms of a plan that may be taken."""
        assert self.fastest is not None
        return self.fastest.time * (1 + self._within)

    def chosen(self) -> Rated:
        """The plan to take: the fastest, or one that is worth the change."""
        assert self.fastest is not None
        if self.fastest.fullest < WORTH:
            return self.fastest
        # The front becomes more even as it becomes slower, and begins with one no slower than the fastest.
        even, quick = [plan for plan in self.front if plan.time <= self.limit][-1], self.front[0]
        if self.fastest.fullest - even.fullest >= WORTH:
            return even
        quicker = quick.time * (1 + self._within) < self.fastest.time
        return quick if quicker and quick.fullest <= self.fastest.fullest + WORTH else self.fastest

    def take(self, _: list[ShardingOption]) -> list[ShardingOption]:
        """The planner's callback: the plan that it goes on with."""
        assert self.fastest is not None
        if self.fastest.fullest >= WORTH:
            plan = self.fastest.placed()
            with suppress(PlannerError):
                self._balanced(plan)
                self.rate(plan)
            for rated in [self.fastest, *self.front]:
                plan = rated.placed()
                if exchange_places(plan, self._nodes, self._room, max(self.limit, rated.time)):
                    self.rate(plan)
        return self.chosen().placed()


class EvenProposer(Proposer):  # type: ignore[misc]
    """Proposes the best plan so far with another way for one of the large tables of its fullest rank.

    It comes after the proposers that look for the fastest plan.
    """

    def __init__(self, plans: RecordedPlans) -> None:
        self._plans = plans
        self._ways: dict[str, list[ShardingOption]] = {}
        self._proposals: Iterator[list[ShardingOption]] = iter(())

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        """All ways of all tables."""
        del enumerator
        self._ways = {}
        for option in search_space:
            self._ways.setdefault(option.fqn, []).append(option)
        self._proposals = self._changes()

    def propose(self) -> list[ShardingOption] | None:
        """The next plan to rate; None at the end."""
        return next(self._proposals, None)

    def feedback(
        self,
        partitionable: bool,
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        """Nothing: what is rated is recorded."""
        del partitionable, plan, perf_rating, storage_constraint

    def _changes(self) -> Iterator[list[ShardingOption]]:
        self._plans.close()
        tried, before = 0, None
        while tried < _TRIES and self._plans.fastest is not None:
            best = self._plans.chosen()
            if best is before or best.fullest < WORTH:
                return
            before = best
            for number in self._largest_there(best):
                for way in self._ways[best.options[number].fqn]:
                    if way is not best.options[number]:
                        tried += 1
                        yield [*best.options[:number], way, *best.options[number + 1 :]]

    def _largest_there(self, rated: Rated) -> list[int]:
        """The numbers of the tables that take most of the fullest rank."""
        options = rated.placed()
        held = list(self._plans.shares(options))
        rank = held.index(max(held))
        sizes = {}
        for number, option in enumerate(options):
            sizes[number] = sum(s.storage.hbm + s.storage.ddr for s in option.shards if s.rank == rank)
            for shard in option.shards:
                # As the planner has them before they are placed.
                shard.rank = None
        return sorted((n for n in sizes if sizes[n]), key=lambda n: (-sizes[n], n))[:_LARGEST]
