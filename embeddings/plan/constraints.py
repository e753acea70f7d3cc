"""What each table may become, as TorchRec's planner is told, and whether a plan keeps to it."""

from __future__ import annotations

from collections.abc import Sequence

from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import CacheParams, ShardingPlan

from embeddings.errors import ConfigError, hint_of
from embeddings.groups import TableGroup, TableSpec
from embeddings.lookup.sharded import leaves_ranks_empty
from embeddings.plan.request import UNIFIED, Cluster, PlanRequest, TableRule
from embeddings.plan.traffic import Lookup

# Column shards keep one row-wise accumulator each, so such state cannot be resharded; and row-wise bags are
# padded on gloo. On a CPU, where memory is not the limit, whole tables do.
_DEFAULT_SHARDING = {"cpu": ("table_wise",), "cuda": ("table_wise", "row_wise", "table_row_wise")}
# FBGEMM's kernels of a GPU refuse wider rows (1.8: `max_embedding_dim` in
# fbgemm_gpu/codegen/genscript/jinja_environment.py, checked by forward and backward for each table by itself,
# so for each column shard). Those of a CPU know no such bound.
WIDEST_ON_CUDA = 2048
_CUT_COLUMNS = ("column_wise", "grid_shard")
_ALGORITHMS = {None: None, "lru": CacheAlgorithm.LRU, "lfu": CacheAlgorithm.LFU}


def constraints_of(request: PlanRequest) -> dict[str, ParameterConstraints]:
    """The planner's constraints: what each table may become, and how much a rank asks of it in a step.

    Raises:
        ConfigError: a rule names an unknown table, or a kernel that is not allowed; or a table is too wide
            for a GPU in every way that it may lie.
    """
    names = [group.table_name(table) for group in request.groups for table in group.all_tables]
    for name in request.rules.tables:
        if name not in names:
            hint = hint_of(name, names, f"tables: {', '.join(names)}")
            raise ConfigError(f"plan.tables.{name}: no such table; {hint}")
    return {
        group.table_name(table): _constraint(request, group, table)
        for group in request.groups
        for table in group.all_tables
    }


def _constraint(request: PlanRequest, group: TableGroup, table: TableSpec) -> ParameterConstraints:
    name, cluster = group.table_name(table), request.cluster
    rule = request.rules.tables.get(name, TableRule())
    for kernel in rule.kernels:
        if kernel in UNIFIED and not request.rules.allow_unified_memory:
            raise ConfigError(
                f"plan.tables.{name}.kernels: {kernel} puts rows in host memory; set "
                "plan.allow_unified_memory = true as well"
            )
    sharding = rule.sharding or group.sharding or _default_sharding(cluster, table.rows)
    if cluster.device == "cuda" and table.dim > WIDEST_ON_CUDA:
        sharding = tuple(kind for kind in sharding if kind in _CUT_COLUMNS)
        if not sharding:
            raise ConfigError(_too_wide(group, table))
    _check_data_parallel(group, name, sharding)
    # Data-parallel tables know no other kernel than `dense`, and only they may have it.
    kernels = rule.kernels or ("fused", *(["dense"] if "data_parallel" in sharding else []))
    if request.rules.allow_unified_memory and not rule.kernels:
        kernels = (*kernels, *UNIFIED)
    lookup = request.lookups.get(name, Lookup(1, 1))
    # None = FBGEMM's defaults.
    cache = None
    if rule.cache_algorithm is not None or rule.cache_load_factor is not None:
        cache = CacheParams(algorithm=_ALGORITHMS[rule.cache_algorithm], load_factor=rule.cache_load_factor)
    return ParameterConstraints(
        sharding_types=list(sharding),
        # Always given: without a list the planner falls back to host memory unasked.
        compute_kernels=list(kernels),
        # A bag is one behavior or candidate; a rank has its part of a step's bags.
        pooling_factors=[lookup.ids / max(lookup.bags, 1)],
        num_poolings=[1.0],
        batch_sizes=[max(1, -(-lookup.bags // cluster.world_size))],
        min_partition=_columns_a_shard(table.dim, cluster, sharding),
        cache_params=cache,
        stochastic_rounding=rounding_of(group, cluster.device),
    )


def _check_data_parallel(group: TableGroup, name: str, sharding: tuple[str, ...]) -> None:
    """The same as the config checks of a group's own types, for those of `plan.tables`."""
    for key, given in (
        ("max_gradient", group.optimizer.max_gradient),
        ("stochastic_rounding", group.stochastic_rounding),
    ):
        if given and "data_parallel" in sharding:
            raise ConfigError(
                f"plan.tables.{name}.sharding: data_parallel tables have no fused kernel, which "
                f"groups.{group.name}.{key} is for; use another sharding, or leave that out"
            )


def _default_sharding(cluster: Cluster, rows: int) -> tuple[str, ...]:
    """What a table may become unasked: no row shards where some ranks would get no row."""
    among = {"row_wise": cluster.world_size, "table_row_wise": cluster.local_world_size}
    return tuple(
        kind
        for kind in _DEFAULT_SHARDING[cluster.device]
        if kind not in among or not leaves_ranks_empty(rows, among[kind])
    )


def _columns_a_shard(dim: int, cluster: Cluster, sharding: Sequence[str]) -> int:
    """Least width of column shards: one a rank, in fours as the kernels work; TorchRec's default is 128.

    Of `grid_shard` there is one a node, since each keeps a row-wise state of its own. TorchRec takes the next
    wider one that divides the table. Where that is too wide for a GPU, there are more shards than ranks.
    """
    places = cluster.world_size
    if "grid_shard" in sharding and not {"column_wise", "table_column_wise"} & set(sharding):
        places //= cluster.local_world_size
    least = max(-(-dim // places) + 3 & ~3, 4)
    if cluster.device == "cpu":
        return least
    even = [width for width in range(4, min(dim, WIDEST_ON_CUDA) + 1, 4) if dim % width == 0]
    return min((width for width in even if width >= least), default=even[-1])


def rounding_of(group: TableGroup, device: str) -> bool | None:
    """Whether updated rows are rounded at random; None where kernels do the same whatever they are told.

    They do so on a CPU, which rounds to nearest, and for fp32 rows, which are not rounded at all.
    """
    if device != "cuda" or group.dtype != "fp16":
        return None
    return group.stochastic_rounding is not False


def check_rules(plan: ShardingPlan, request: PlanRequest, where: str) -> None:
    """Refuse a plan that was made elsewhere and breaks the rules of this request; `where` leads the message.

    Raises:
        ConfigError: it uses unified memory where that is not allowed, has rows that are too wide for a GPU,
            or rounds them otherwise.
    """
    placed = {name: sharding for module in plan.plan.values() for name, sharding in module.items()}
    for group in request.groups:
        for table in group.all_tables:
            name = group.table_name(table)
            sharding = placed[name]
            if sharding.compute_kernel in UNIFIED and not request.rules.allow_unified_memory:
                raise ConfigError(
                    f"{where}: table {name} uses {sharding.compute_kernel}, host memory behind the "
                    "device's; plan again, or set plan.allow_unified_memory = true"
                )
            spec = sharding.sharding_spec
            widest = table.dim if spec is None else max(shard.shard_sizes[1] for shard in spec.shards)
            if request.cluster.device == "cuda" and widest > WIDEST_ON_CUDA:
                raise ConfigError(f"{where}: {_too_wide(group, table)}; and plan again")
            wanted = rounding_of(group, request.cluster.device)
            # A plan that does not say leaves it to the kernels, whose default is to round at random.
            planned = sharding.stochastic_rounding is not False
            if wanted is not None and planned != wanted:
                words = {True: "stochastically", False: "to nearest"}
                raise ConfigError(
                    f"{where}: table {name} is rounded {words[planned]} there, {words[wanted]} by groups."
                    f"{group.name}.stochastic_rounding of this config; plan again with it"
                )


def _too_wide(group: TableGroup, table: TableSpec) -> str:
    name = group.table_name(table)
    return (
        f"groups.{group.name}: feature {table.feature} has dim = {table.dim}, but lookups on a GPU (FBGEMM's "
        f"kernels) take rows of at most {WIDEST_ON_CUDA} numbers: make dim {WIDEST_ON_CUDA} or less, or cut "
        f'the table by columns with plan.tables.{name}.sharding = ["column_wise"] (all of the group with '
        f'groups.{group.name}.sharding = ["column_wise"])'
    )
