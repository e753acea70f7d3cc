"""Where the tables lie: TorchRec's planner, asked by running ranks or offline, and its answer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.types import (
    HardwareConfig,
    KernelConfig,
    ParameterConstraints,
    PlannerError,
    ShardingOption,
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
from embeddings.plan.file import SavedPlan, check_fits, from_tree, read_plan_file, to_tree
from embeddings.plan.memory import Reservation, TableNeed, shortfall
from embeddings.plan.request import Cluster, PlanRequest
from embeddings.plan.search import ChosenOptions, Enumerator, Partitioner, fewer_ways
from embeddings.plan.tables import Table, dense_bytes, tables_of

_GRID = 300


@dataclass(frozen=True)
class PlanEstimate:
    """A plan with the planner's own figures.

    Attributes:
        plan: TorchRec's; options: the chosen way of each table, its shards with storage and time estimates.
        tables: by name; usable: bytes of a rank that tables may take.
    """

    plan: ShardingPlan
    options: list[ShardingOption]
    tables: dict[str, Table]
    usable: int


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
    shapes = {name: table.shape for name, table in tables_of(request.model).items()}
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
        raise _no_way(request, constraints, error) from None
    reservation = Reservation(request.rules.reserve, dense_bytes(request.model, tables))
    usable = reservation.left(request.cluster.memory)
    # The planner tries hundreds of arrangements before it says what one sum tells.
    _check_room(request, options, usable, certain=True)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        constraints=constraints,
        enumerator=enumerator,
        storage_reservation=reservation,
        partitioner=Partitioner(request.say, len(tables), request.cluster.world_size),
        # TorchRec's four, but no grid of thousands: eight tables of three types each took it a minute.
        proposer=[
            GridSearchProposer(max_proposals=_GRID),
            GreedyProposer(),
            GreedyProposer(use_depth=False),
            UniformProposer(),
        ],
        stats=chosen,
        debug=False,
    )
    try:
        plan = planner.plan(request.model, kinds)
    except PlannerError:
        _check_room(request, options, usable, certain=False)
        raise
    return PlanEstimate(plan, chosen.options, tables, usable)


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


def _no_way(
    request: PlanRequest, constraints: Mapping[str, ParameterConstraints], error: RuntimeError
) -> Exception:
    """A table that can be nothing of what is allowed."""
    name = next((name for name in constraints if f" for {name}." in str(error)), None)
    if name is None:
        return error
    types, kernels = constraints[name].sharding_types, constraints[name].compute_kernels
    return ConfigError(
        f"{_where(request.cluster)}: table {name} can be none of {', '.join(types)} with kernel "
        f"{' or '.join(kernels)} there; allow other types in its group's sharding, or in "
        f"plan.tables.{name}"
    )


def _where(cluster: Cluster) -> str:
    return f"no sharding plan for {cluster.world_size} rank(s) on {cluster.device}"


def placements(saved: SavedPlan, groups: Iterable[TableGroup]) -> list[Placement]:
    """The plan as lines, in the order of the groups and their tables."""
    found = {}
    for module in saved.plan.plan.values():
        for table, sharding in module.items():
            found[table] = sharding
    return [
        Placement(
            name,
            table.rows,
            table.dim,
            found[name].sharding_type,
            found[name].compute_kernel,
            tuple(found[name].ranks),
            saved.tables[name][2],
        )
        for group in groups
        for table in group.tables
        for name in [group.table_name(table.feature)]
    ]
