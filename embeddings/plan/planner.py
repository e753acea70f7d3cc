"""Where the tables lie: TorchRec's planner, asked by running ranks or offline, and its answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner, MemoryBalancedPartitioner
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    ParameterConstraints,
    PlannerError,
    ShardingOption,
    Stats,
    Topology,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ShardingPlan

from embeddings.agreement import from_rank_0
from embeddings.errors import ConfigError
from embeddings.groups import TableGroup
from embeddings.lookup.sharding import sharders
from embeddings.plan.bandwidths import TORCHREC
from embeddings.plan.constraints import check_rules, constraints_of
from embeddings.plan.evenness import EvenProposer, Rated, RecordedPlans
from embeddings.plan.file import SavedPlan, check_fits, from_tree, read_plan_file, to_tree
from embeddings.plan.memory import Reservation, StorageEstimator, TableNeed, shortfall
from embeddings.plan.request import Cluster, PlanRequest
from embeddings.plan.tables import Table, dense_bytes, tables_of

_GRID = 300
# The largest tables, so many of them, are tried in all their ways; all others in one.
_DETAILED = 32
_PATIENCE_S = 5.0


@dataclass(frozen=True)
class PlanEstimate:
    """A plan with the planner's own figures.

    Attributes:
        plan: TorchRec's; options: the chosen way of each table, its shards with storage and time estimates.
        tables: by name; usable: bytes of a rank that tables may take.
        taken, fastest: the plan as it was rated, and the one that is estimated to be the fastest.
        front: other plans, each more even and slower than the one before.
    """

    plan: ShardingPlan
    options: list[ShardingOption]
    tables: dict[str, Table]
    usable: int
    taken: Rated
    fastest: Rated
    front: list[Rated]


class DoesNotFit(ConfigError):
    """No plan fits; `parts` say of each table what it needs."""

    def __init__(self, message: str, parts: list[TableNeed]) -> None:
        super().__init__(message)
        self.parts = parts


@dataclass(frozen=True)
class Placement:
    """Where one table lies: a line of the printed plan."""

    table: str
    rows: int
    dim: int
    sharding: str
    kernel: str
    ranks: tuple[int, ...]
    weight_bytes: int

    @property
    def megabytes(self) -> float:
        """Weights, over all ranks."""
        return self.rows * self.dim * self.weight_bytes / 1e6


def make_plan(request: PlanRequest) -> SavedPlan:
    """Ask TorchRec's planner on rank 0; collective, so that all ranks hold the same plan.

    Raises:
        ConfigError: on every rank: a rule is wrong, or no plan fits.
    """
    # TorchRec's collective_plan leaves the other ranks waiting where rank 0 fails; and hundreds of tables may
    # take the planner longer than a collective waits.
    tree = from_rank_0(lambda: to_tree(saved_plan(request, offline_plan(request).plan)), slow=True)
    return from_tree(tree, "plan of rank 0")


def read_plan(path: Path, request: PlanRequest) -> SavedPlan:
    """A plan that was written before, for this very request.

    Raises:
        ConfigError: it is unreadable, was made for something else, or breaks the rules.
    """
    return check_plan(read_plan_file(path), request, str(path))


def check_plan(saved: SavedPlan, request: PlanRequest, where: str) -> SavedPlan:
    """The plan itself, once it is known to suit the request; `where` leads every message.

    Raises:
        ConfigError: it was made for something else, or breaks the rules.
    """
    modules = {name: table.module for name, table in tables_of(request.model).items()}
    check_fits(saved, saved_plan(request, ShardingPlan({})), modules, where)
    check_rules(saved.plan, request, where)
    return saved


def saved_plan(request: PlanRequest, plan: ShardingPlan) -> SavedPlan:
    """A plan with what it was made for."""
    cluster = request.cluster
    shapes = {t.name: (t.rows, t.dim, t.weight_bytes) for t in tables_of(request.model).values()}
    return SavedPlan(plan, cluster.device, cluster.world_size, cluster.local_world_size, shapes)


def offline_plan(request: PlanRequest) -> PlanEstimate:
    """The plan that `make_plan` would find on such a cluster, without a process group or a GPU.

    Raises:
        ConfigError: a rule is wrong, or no plan fits (DoesNotFit).
    """
    constraints = constraints_of(request)
    fewer = fewer_ways(constraints, tables_of(request.model))
    if fewer != constraints:
        # The largest tables decide: what fits so is as good, and takes a fraction of the time.
        with suppress(ConfigError, PlannerError):
            return _plan_within(request, fewer)
    return _plan_within(request, constraints)


def _plan_within(request: PlanRequest, constraints: dict[str, ParameterConstraints]) -> PlanEstimate:
    tables, kinds, chosen = tables_of(request.model), sharders(request.comms), ChosenOptions()
    topology = _topology(request.cluster)
    enumerator = Enumerator(topology, constraints, tables)
    try:
        options = enumerator.enumerate(request.model, kinds)
    except RuntimeError as error:
        name = next((name for name in constraints if f" for {name}." in str(error)), None)
        if name is None:
            raise
        types, kernels = constraints[name].sharding_types, constraints[name].compute_kernels
        raise ConfigError(
            f"{_where(request.cluster)}: table {name} can be none of {', '.join(types)} with kernel "
            f"{' or '.join(kernels)} there; allow other types in its group's sharding, or in "
            f"plan.tables.{name}"
        ) from None
    reservation = Reservation(request.rules.reserve, dense_bytes(request.model, tables), request.more_dense)
    usable = reservation.left(request.cluster.memory)
    # The planner tries hundreds of arrangements before it says what one sum tells.
    _check_room(request, options, usable, certain=True)
    partitioner = Partitioner(request.say, len(tables), request.cluster.world_size)
    room = (usable, request.cluster.ddr) if request.cluster.device == "cuda" else (0, usable)
    plans = RecordedPlans(topology, room, request.rules.even_within, partitioner.balanced)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        constraints=constraints,
        performance_model=plans,
        callbacks=[plans.take],
        enumerator=enumerator,
        storage_reservation=reservation,
        partitioner=partitioner,
        # TorchRec's four, but no grid of thousands: eight tables of three types each took it a minute.
        proposer=[
            GridSearchProposer(max_proposals=_GRID),
            GreedyProposer(),
            GreedyProposer(use_depth=False),
            UniformProposer(),
            EvenProposer(plans),
        ],
        stats=chosen,
        debug=False,
    )
    try:
        plan = planner.plan(request.model, kinds)
    except PlannerError:
        _check_room(request, options, usable, certain=False)
        raise
    assert plans.fastest is not None
    return PlanEstimate(plan, chosen.options, tables, usable, plans.chosen(), plans.fastest, plans.front)


def _topology(cluster: Cluster) -> Topology:
    # TorchRec says once a process that it made one.
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    gpus = cluster.device == "cuda"
    # Of GPUs all are named, and of CPUs none: releases of TorchRec differ in what they make of the others.
    bandwidths = cluster.bandwidths.over(TORCHREC).for_torchrec() if gpus else {}
    return TopologyFactory.create_topology(
        TrainerConfig(
            world_size=cluster.world_size,
            local_world_size=cluster.local_world_size,
            hbm_cap_bytes=cluster.hbm,
            ddr_cap_bytes=cluster.ddr,
        ),
        hardware_config=HardwareConfig(**bandwidths),
        kernel_config=KernelConfig(
            compute_device=cluster.device,
            # Otherwise the bandwidths are left aside.
            use_hardware_based_bandwidth=gpus,
        ),
    )


def _check_room(request: PlanRequest, options: list[ShardingOption], usable: int, certain: bool) -> None:
    """Raise what does not fit; only what no arrangement could make fit if `certain`."""
    cluster = request.cluster
    message, parts = shortfall(options, usable, cluster, certain)
    if message:
        raise DoesNotFit(f"{_where(cluster)}: {message}", parts)


def _where(cluster: Cluster) -> str:
    return f"no sharding plan for {cluster.world_size} rank(s) on {cluster.device}"


def placements(saved: SavedPlan, groups: Iterable[TableGroup]) -> list[Placement]:
    """The plan as lines, in the order of the groups and their tables."""
    placed = {name: sharding for tables in saved.plan.plan.values() for name, sharding in tables.items()}
    lines = []
    for group in groups:
        for table in group.all_tables:
            name = group.table_name(table)
            sharding, (rows, dim, weight_bytes) = placed[name], saved.tables[name]
            kind, kernel, ranks = sharding.sharding_type, sharding.compute_kernel, tuple(sharding.ranks)
            lines.append(Placement(name, rows, dim, kind, kernel, ranks, weight_bytes))
    return lines


class ChosenOptions(Stats):  # type: ignore[misc]
    """Keeps what the planner tells its statistics."""

    def __init__(self) -> None:
        self.options: list[ShardingOption] = []

    def log(self, *_: Any, best_plan: list[ShardingOption], **__: Any) -> None:
        self.options = best_plan


class Enumerator(EmbeddingEnumerator):  # type: ignore[misc]
    """Lists the ways of all tables once, although the planner asks again."""

    def __init__(
        self, topology: Topology, constraints: Mapping[str, ParameterConstraints], tables: Mapping[str, Table]
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
        self._rules = constraints

    def enumerate(self, *given: Any, **named: Any) -> list[ShardingOption]:
        """The ways, with time and storage."""
        if not self._options:
            # TorchRec lists ways in the order of a set, which differs from process to process; of plans that
            # are as good the first is taken.
            self._options = sorted(super().enumerate(*given, **named), key=self._place)
        return list(self._options)

    def _place(self, option: ShardingOption) -> tuple[int, int, int]:
        rule = self._rules[option.name]
        return (
            list(self._rules).index(option.name),
            rule.sharding_types.index(option.sharding_type),
            rule.compute_kernels.index(option.compute_kernel),
        )


class Partitioner(GreedyPerfPartitioner):  # type: ignore[misc]
    """TorchRec's, which says after some seconds, and then now and again, that it is at work."""

    def __init__(self, say: Callable[[str], None], tables: int, ranks: int) -> None:
        super().__init__()
        self._say, self._tables, self._ranks = say, tables, ranks
        self._tried, self._start, self._next = 0, time.monotonic(), _PATIENCE_S
        self._left: Topology | None = None

    def partition(
        self, proposal: list[ShardingOption], storage_constraint: Topology, *given: Any, **named: Any
    ) -> list[ShardingOption]:
        """Give the shards of one arrangement their ranks."""
        elapsed = time.monotonic() - self._start
        if elapsed >= self._next:
            self._next = 2 * elapsed
            self._say(
                f"planning where {self._tables:,} tables lie on {self._ranks} rank(s): {self._tried:,} "
                f"arrangements tried in {elapsed:.0f} s"
            )
        self._tried += 1
        self._left = storage_constraint
        placed: list[ShardingOption] = super().partition(proposal, storage_constraint, *given, **named)
        return placed

    def balanced(self, proposal: list[ShardingOption]) -> None:
        """Give the shards their ranks once more: slow tables first, and by memory where that is as fast.

        Raises:
            PlannerError: they do not fit so.
        """
        MemoryBalancedPartitioner().partition(proposal, self._left)


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
