"""Where the tables lie: TorchRec's planner, asked by running ranks or offline, and its answer."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.types import (
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
from embeddings.comms import AS_THEY_ARE, Comms
from embeddings.empty_shards import leaves_ranks_empty
from embeddings.errors import ConfigError
from embeddings.exchange import Lookup
from embeddings.groups import TableGroup, TableSpec
from embeddings.plan_file import SavedPlan, check_fits, from_tree, read_plan_file, to_tree
from embeddings.plan_memory import Reservation, Unplaced, shortfall
from embeddings.plan_search import Enumerator, Keep, Partitioner, fewer_ways
from embeddings.sharding import sharders
from embeddings.tables import Table, dense_bytes, tables_of

# Column shards keep one row-wise accumulator each, so such state cannot be resharded; and row-wise bags are
# padded on gloo. On a CPU, where memory is not the limit, whole tables do.
_DEFAULT_SHARDING = {"cpu": ("table_wise",), "cuda": ("table_wise", "row_wise", "table_row_wise")}
_DEFAULT_KERNELS = ("fused",)
_GRID = 300
_UNIFIED = ("fused_uvm", "fused_uvm_caching")


@dataclass(frozen=True)
class Cluster:
    """What the tables are to lie on.

    Attributes:
        device: `cpu` or `cuda`; world_size: ranks; local_world_size: ranks of a node.
        hbm, ddr: bytes of device memory (0 on a CPU) and of host memory that one rank has.
    """

    device: str
    world_size: int
    local_world_size: int
    hbm: int
    ddr: int

    @property
    def memory(self) -> int:
        """Bytes a rank has for its tables and everything else."""
        return self.ddr if self.device == "cpu" else self.hbm


@dataclass(frozen=True)
class TableRule:
    """What the planner may do with one table; empty = the defaults of its group and device."""

    sharding: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlanRules:
    """What the planner may do.

    Attributes:
        allow_unified_memory: let the planner use host memory as device memory where nothing else fits.
        reserve: share of a rank's memory that tables leave free.
        tables: table name -> its own rule.
    """

    allow_unified_memory: bool = False
    reserve: float = 0.15
    tables: Mapping[str, TableRule] = field(default_factory=dict)


def keep_quiet(line: str) -> None:
    """Says nothing."""
    del line


@dataclass(frozen=True)
class Task:
    """A planner's question.

    Attributes:
        model: with tables on the meta device and fused optimizers attached; groups: its table groups.
        cluster: the ranks; rules: what is allowed; lookups: table -> what a step asks of it.
        comms: what vectors and gradients are rounded to on their way, by which the planner's time follows.
        say: is told now and again that a slow planner is still at work.
    """

    model: nn.Module
    groups: tuple[TableGroup, ...]
    cluster: Cluster
    rules: PlanRules = PlanRules()
    lookups: Mapping[str, Lookup] = field(default_factory=dict)
    comms: Comms = AS_THEY_ARE
    say: Callable[[str], None] = keep_quiet


@dataclass(frozen=True)
class Found:
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

    def __init__(self, message: str, parts: list[Unplaced]) -> None:
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


def make_plan(task: Task) -> SavedPlan:
    """Ask TorchRec's planner on rank 0; collective, so that all ranks hold the same plan.

    Raises:
        ConfigError: on every rank: a rule is wrong, or no plan fits.
    """
    # TorchRec's collective_plan leaves the other ranks waiting where rank 0 fails; and hundreds of tables may
    # take the planner longer than a collective waits.
    tree = from_rank_0(lambda: to_tree(saved_plan(task, offline_plan(task).plan)), slow=True)
    return from_tree(tree, "plan of rank 0")


def read_plan(path: Path, task: Task) -> SavedPlan:
    """A plan that was written before, for this very task.

    Raises:
        ConfigError: it is unreadable, was made for something else, or breaks the rules.
    """
    return check_plan(read_plan_file(path), task, str(path))


def check_plan(saved: SavedPlan, task: Task, where: str) -> SavedPlan:
    """The plan itself, once it is known to suit the task; `where` leads every message.

    Raises:
        ConfigError: it was made for something else, or breaks the rules.
    """
    modules = {name: table.module for name, table in tables_of(task.model).items()}
    check_fits(saved, saved_plan(task, ShardingPlan({})), modules, where)
    _check_kernels(saved.plan, task.rules, where)
    return saved


def saved_plan(task: Task, plan: ShardingPlan) -> SavedPlan:
    """A plan with what it was made for."""
    cluster = task.cluster
    shapes = {name: table.shape for name, table in tables_of(task.model).items()}
    return SavedPlan(plan, cluster.device, cluster.world_size, cluster.local_world_size, shapes)


def offline_plan(task: Task) -> Found:
    """The plan that `make_plan` would find on such a cluster, without a process group or a GPU.

    Raises:
        ConfigError: a rule is wrong, or no plan fits (DoesNotFit).
    """
    constraints = constraints_of(task)
    fewer = fewer_ways(constraints, tables_of(task.model))
    if fewer != constraints:
        # The largest tables decide: what fits so is as good, and takes a fraction of the time.
        with suppress(ConfigError, PlannerError):
            return _plan_within(task, fewer)
    return _plan_within(task, constraints)


def _plan_within(task: Task, constraints: dict[str, ParameterConstraints]) -> Found:
    tables, kinds, kept = tables_of(task.model), sharders(task.comms), Keep()
    topology = _topology(task.cluster)
    enumerator = Enumerator(topology, constraints, tables)
    try:
        options = enumerator.enumerate(task.model, kinds)
    except RuntimeError as error:
        raise _no_way(task, constraints, error) from None
    reservation = Reservation(task.rules.reserve, dense_bytes(task.model, tables))
    usable = reservation.left(task.cluster.memory)
    # The planner tries hundreds of arrangements before it says what one sum tells.
    _check_room(task, options, usable, certain=True)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        constraints=constraints,
        enumerator=enumerator,
        storage_reservation=reservation,
        partitioner=Partitioner(task.say, len(tables), task.cluster.world_size),
        # TorchRec's four, but no grid of thousands: eight tables of three types each took it a minute.
        proposer=[
            GridSearchProposer(max_proposals=_GRID),
            GreedyProposer(),
            GreedyProposer(use_depth=False),
            UniformProposer(),
        ],
        stats=kept,
        debug=False,
    )
    try:
        plan = planner.plan(task.model, kinds)
    except PlannerError:
        _check_room(task, options, usable, certain=False)
        raise
    return Found(plan, kept.options, tables, usable)


def _check_kernels(plan: ShardingPlan, rules: PlanRules, where: str) -> None:
    """Refuse a plan that uses unified memory where that is not allowed."""
    for module in plan.plan.values():
        for table, sharding in module.items():
            if sharding.compute_kernel in _UNIFIED and not rules.allow_unified_memory:
                raise ConfigError(
                    f"{where}: table {table} uses {sharding.compute_kernel}, host memory behind the "
                    "device's; plan again, or set plan.allow_unified_memory = true"
                )


def _topology(cluster: Cluster) -> Topology:
    # TorchRec says once a process that it made one.
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    return TopologyFactory.create_topology(
        TrainerConfig(
            world_size=cluster.world_size,
            local_world_size=cluster.local_world_size,
            hbm_cap_bytes=cluster.hbm,
            ddr_cap_bytes=cluster.ddr,
        ),
        kernel_config=KernelConfig(compute_device=cluster.device),
    )


def constraints_of(task: Task) -> dict[str, ParameterConstraints]:
    """The planner's constraints: what each table may become, and how much a rank asks of it in a step.

    Raises:
        ConfigError: a rule names an unknown table, or a kernel that is not allowed.
    """
    names = [group.table_name(table.feature) for group in task.groups for table in group.tables]
    for name in task.rules.tables:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"tables: {', '.join(names)}"
            raise ConfigError(f"plan.tables.{name}: no such table; {hint}")
    return {
        group.table_name(table.feature): _constraint(task, group, table)
        for group in task.groups
        for table in group.tables
    }


def _constraint(task: Task, group: TableGroup, table: TableSpec) -> ParameterConstraints:
    name, dim = group.table_name(table.feature), table.dim
    rule = task.rules.tables.get(name, TableRule())
    for kernel in rule.kernels:
        if kernel in _UNIFIED and not task.rules.allow_unified_memory:
            raise ConfigError(
                f"plan.tables.{name}.kernels: {kernel} puts rows in host memory; set "
                "plan.allow_unified_memory = true as well"
            )
    sharding = rule.sharding or group.sharding or _default_sharding(task.cluster, table.rows)
    # Data-parallel tables know no other kernel than `dense`, and only they may have it.
    kernels = rule.kernels or (*_DEFAULT_KERNELS, *(["dense"] if "data_parallel" in sharding else []))
    if task.rules.allow_unified_memory and not rule.kernels:
        kernels = (*kernels, *_UNIFIED)
    lookup = task.lookups.get(name, Lookup(1, 1))
    return ParameterConstraints(
        sharding_types=list(sharding),
        # Always given: without a list the planner falls back to host memory unasked.
        compute_kernels=list(kernels),
        # A bag is one behavior or candidate; a rank has its part of a step's bags.
        pooling_factors=[lookup.ids / max(lookup.bags, 1)],
        num_poolings=[1.0],
        batch_sizes=[max(1, -(-lookup.bags // task.cluster.world_size))],
        min_partition=_columns_a_shard(dim, task.cluster.world_size),
    )


def _default_sharding(cluster: Cluster, rows: int) -> tuple[str, ...]:
    """What a table may become unasked: no row shards where some ranks would get no row."""
    among = {"row_wise": cluster.world_size, "table_row_wise": cluster.local_world_size}
    return tuple(
        kind
        for kind in _DEFAULT_SHARDING[cluster.device]
        if kind not in among or not leaves_ranks_empty(rows, among[kind])
    )


def _columns_a_shard(dim: int, world_size: int) -> int:
    """Width of column shards, one a rank, in fours as the kernels work; TorchRec's default is 128."""
    return max(-(-dim // world_size) + 3 & ~3, 4)


def _check_room(task: Task, options: list[ShardingOption], usable: int, certain: bool) -> None:
    """Raise what does not fit; only what no arrangement could make fit if `certain`."""
    cluster = task.cluster
    message, parts = shortfall(options, usable, cluster.world_size, cluster.device, certain)
    if message:
        raise DoesNotFit(f"{_where(cluster)}: {message}", parts)


def _no_way(task: Task, constraints: Mapping[str, ParameterConstraints], error: RuntimeError) -> Exception:
    """A table that can be nothing of what is allowed."""
    name = next((name for name in constraints if f" for {name}." in str(error)), None)
    if name is None:
        return error
    types, kernels = constraints[name].sharding_types, constraints[name].compute_kernels
    return ConfigError(
        f"{_where(task.cluster)}: table {name} can be none of {', '.join(types)} with kernel "
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
