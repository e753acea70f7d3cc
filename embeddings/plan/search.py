"""How TorchRec's planner searches here: ways listed once, few for small tables, and not in silence."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator
from torchrec.distributed.planner.types import ParameterConstraints, ShardingOption, Stats, Topology

from embeddings.plan.memory import StorageEstimator
from embeddings.plan.tables import Table

# The largest tables, so many of them, are tried in all their ways; all others in one.
_DETAILED = 32
_PATIENCE_S = 5.0


class ChosenOptions(Stats):  # type: ignore[misc]
    """Keeps what the planner tells its statistics."""

    def __init__(self) -> None:
        self.options: list[ShardingOption] = []

    def log(self, *_: Any, best_plan: list[ShardingOption], **__: Any) -> None:
        self.options = best_plan


class Enumerator(EmbeddingEnumerator):  # type: ignore[misc]
    """Lists the ways of all tables once, although the planner asks again."""

    def __init__(
        self,
        topology: Topology,
        constraints: Mapping[str, ParameterConstraints],
        tables: Mapping[str, Table],
    ) -> None:
        super().__init__(
            topology=topology,
            batch_size=1,
            constraints=constraints,
            estimator=[
                EmbeddingPerfEstimator(topology=topology, constraints=constraints),
                StorageEstimator(topology=topology, constraints=constraints, tables=tables),
            ],
        )
        self._options: list[ShardingOption] = []

    def enumerate(self, *given: Any, **named: Any) -> list[ShardingOption]:
        """The ways, with time and storage."""
        self._options = self._options or super().enumerate(*given, **named)
        return list(self._options)


class Partitioner(GreedyPerfPartitioner):  # type: ignore[misc]
    """TorchRec's, which says after some seconds, and then now and again, that it is at work."""

    def __init__(self, say: Callable[[str], None], tables: int, ranks: int) -> None:
        super().__init__()
        self._say, self._tables, self._ranks = say, tables, ranks
        self._tried, self._start, self._next = 0, time.monotonic(), _PATIENCE_S

    def partition(self, *given: Any, **named: Any) -> list[ShardingOption]:
        """Give the shards of one arrangement their ranks."""
        elapsed = time.monotonic() - self._start
        if elapsed >= self._next:
            self._next = 2 * elapsed
            self._say(
                f"planning where {self._tables:,} tables lie on {self._ranks} rank(s): {self._tried:,} "
                f"arrangements tried in {elapsed:.0f} s"
            )
        self._tried += 1
        placed: list[ShardingOption] = super().partition(*given, **named)
        return placed


def fewer_ways(
    constraints: Mapping[str, ParameterConstraints], tables: Mapping[str, Table]
) -> dict[str, ParameterConstraints]:
    """The constraints, but all except the largest tables get one way only, where that is allowed.

    TorchRec tries some arrangements for each way of each table, and each takes time for every table.
    """
    by_size = sorted(tables, key=lambda name: -tables[name].weights(tables[name].rows, tables[name].dim))
    found = dict(constraints)
    for name in by_size[_DETAILED:]:
        ways = constraints[name]
        if "table_wise" in ways.sharding_types and "fused" in ways.compute_kernels:
            found[name] = replace(ways, sharding_types=["table_wise"], compute_kernels=["fused"])
    return found
